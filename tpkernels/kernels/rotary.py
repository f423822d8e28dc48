"""Triton kernel of rotary position embedding (Su et al. 2021), forward and backward.

A pair of features (a, b) becomes (a cos - b sin, b cos + a sin). The backward is the same with
the angles negated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import on_device, tl_opmath_dtype
from .launch_config import Tunable, cdiv, power_of_two


@triton.jit
def rotary_kernel(
    input_ptr,  # [batches, heads, tokens, features], any strides
    cos_ptr,  # [tokens, half] or [batches, tokens, half]
    sin_ptr,  # as cos_ptr
    out_ptr,  # as input_ptr
    heads,
    tokens,
    features,
    half,  # number of pairs
    input_batch_stride,
    input_head_stride,
    input_token_stride,
    input_feature_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    out_feature_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    INTERLEAVED: tl.constexpr,  # pairs are neighbours, not `half` apart
    INVERSE: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # at least `half`
    BLOCK_REST: tl.constexpr,  # at least features - 2 half, which pass through; 0 if there are none
):
    """Rotate some heads of some tokens of one sequence, [BLOCK_TOKENS, BLOCK_HEADS, features].

    The angles are read once for all these heads.
    """
    tiles_tokens = tl.cdiv(tokens, BLOCK_TOKENS)
    tiles_heads = tl.cdiv(heads, BLOCK_HEADS)
    pid = tl.program_id(0)
    batch = (pid // (tiles_tokens * tiles_heads)).to(tl.int64)
    token = ((pid // tiles_heads) % tiles_tokens).to(tl.int64) * BLOCK_TOKENS
    token += tl.arange(0, BLOCK_TOKENS)[:, None, None]
    head = (pid % tiles_heads).to(tl.int64) * BLOCK_HEADS
    head += tl.arange(0, BLOCK_HEADS)[None, :, None]
    inside = (token < tokens) & (head < heads)
    x = input_ptr + batch * input_batch_stride + head * input_head_stride
    x += token * input_token_stride
    y = out_ptr + batch * out_batch_stride + head * out_head_stride + token * out_token_stride
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    angles = (token < tokens) & (pair < half)
    cos_row = cos_ptr + batch * cos_batch_stride + token * cos_token_stride
    c = tl.load(cos_row + pair, angles, other=0.0).to(OPMATH)
    sin_row = sin_ptr + batch * sin_batch_stride + token * sin_token_stride
    s = tl.load(sin_row + pair, angles, other=0.0).to(OPMATH)
    if INVERSE:
        s = -s
    if INTERLEAVED:
        col = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        mask = inside & (col < 2 * half)
        both = tl.load(x + col * input_feature_stride, mask, other=0.0).to(OPMATH)
        a, b = tl.split(tl.reshape(both, (BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, 2)))
        rotated = tl.interleave(a * c - b * s, b * c + a * s)
        tl.store(y + col * out_feature_stride, rotated.to(out_ptr.dtype.element_ty), mask)
    else:
        mask = inside & (pair < half)
        a = tl.load(x + pair * input_feature_stride, mask, other=0.0).to(OPMATH)
        b = tl.load(x + (half + pair) * input_feature_stride, mask, other=0.0).to(OPMATH)
        a_out = y + pair * out_feature_stride
        tl.store(a_out, (a * c - b * s).to(out_ptr.dtype.element_ty), mask)
        b_out = y + (half + pair) * out_feature_stride
        tl.store(b_out, (b * c + a * s).to(out_ptr.dtype.element_ty), mask)
    if BLOCK_REST > 0:
        col = 2 * half + tl.arange(0, BLOCK_REST)[None, None, :]
        mask = inside & (col < features)
        tl.store(
            y + col * out_feature_stride,
            tl.load(x + col * input_feature_stride, mask, other=0.0),
            mask,
        )


def _sample(features: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    x = torch.randn(2, 2048, 32, features, dtype=dtype, device=device).transpose(1, 2)
    angles = torch.ones(2048, features // 2, dtype=dtype, device=device)
    return lambda: rotary(x, angles, angles, False, False)


TUNABLE = Tunable("rotary", heuristics.rotary_tiles, _sample)


def _angle_strides(angles: Tensor) -> tuple[int, int]:
    """Return the strides of batches and tokens; sequences may share the angles."""
    return angles.stride(0) if angles.dim() == 3 else 0, angles.stride(-2)


def rotary(
    input: Tensor,  # [batches, heads, tokens, features]
    cos: Tensor,  # [tokens, half] or [batches, tokens, half]
    sin: Tensor,  # as cos
    interleaved: bool,
    inverse: bool,
) -> Tensor:
    """Return `input` with its first 2 half features rotated, in `input`'s strides."""
    out = torch.empty_like(input)
    if not input.numel():
        return out
    batches, heads, tokens, features = input.shape
    half = cos.shape[-1]
    cos, sin = (t if t.stride(-1) == 1 or half <= 1 else t.contiguous() for t in (cos, sin))
    # Only the rotated features count: a thread reads 16 bytes of each of their halves.
    config = TUNABLE(2 * half, input.element_size())
    block_heads = min(power_of_two(heads), config.blocks["BLOCK_M"])
    block_tokens = min(config.blocks["BLOCK_M"] // block_heads, power_of_two(tokens))
    tile = config._replace(blocks=dict(BLOCK_HEADS=block_heads, BLOCK_TOKENS=block_tokens))
    rest = features - 2 * half
    strides: Any = (*input.stride(), *out.stride(), *_angle_strides(cos), *_angle_strides(sin))
    with on_device([input]):
        rotary_kernel[(batches * cdiv(tokens, block_tokens) * cdiv(heads, block_heads),)](
            input,
            cos,
            sin,
            out,
            heads,
            tokens,
            features,
            half,
            *strides,  # of input, out, cos, sin
            **tile.options(
                INTERLEAVED=interleaved,
                INVERSE=inverse,
                OPMATH=tl_opmath_dtype(input.dtype),
                BLOCK_HALF=power_of_two(half),
                BLOCK_REST=power_of_two(rest) if rest else 0,
            ),
        )
    return out


OPS = {"rotary": rotary}
