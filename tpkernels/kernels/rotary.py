"""Rotary position embedding (Su et al. 2021), forward and, with the angles negated, backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import on_device, tl_opmath_dtype
from .launch_config import Tunable, cdiv, power_of_two


@triton.jit
def rotary_kernel(
    input_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    heads,
    tokens,
    features,
    half,
    input_batch,
    input_head,
    input_token,
    input_feature,
    out_batch,
    out_head,
    out_token,
    out_feature,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Some heads of some tokens of one sequence, as [BLOCK_TOKENS, BLOCK_HEADS, features]: the angles are read once for all these heads.

    BLOCK_HALF >= half, the number of pairs; BLOCK_REST >= the number of features that pass through, 0 if there are none.
    """
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    head_tiles = tl.cdiv(heads, BLOCK_HEADS)
    program = tl.program_id(0)
    batch = (program // (token_tiles * head_tiles)).to(tl.int64)
    token = ((program // head_tiles) % token_tiles).to(tl.int64) * BLOCK_TOKENS + tl.arange(
        0, BLOCK_TOKENS
    )[:, None, None]
    head = (program % head_tiles).to(tl.int64) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[
        None, :, None
    ]
    inside = (token < tokens) & (head < heads)
    x = input_ptr + batch * input_batch + head * input_head + token * input_token
    y = out_ptr + batch * out_batch + head * out_head + token * out_token
    pair = tl.arange(0, BLOCK_HALF)[None, None, :]
    angles = (token < tokens) & (pair < half)
    c = tl.load(cos_ptr + batch * cos_batch + token * cos_token + pair, angles, other=0.0).to(
        OPMATH
    )
    s = tl.load(sin_ptr + batch * sin_batch + token * sin_token + pair, angles, other=0.0).to(
        OPMATH
    )
    if INVERSE:
        s = -s
    if INTERLEAVED:
        col = tl.arange(0, 2 * BLOCK_HALF)[None, None, :]
        mask = inside & (col < 2 * half)
        both = tl.load(x + col * input_feature, mask, other=0.0).to(OPMATH)
        a, b = tl.split(tl.reshape(both, (BLOCK_TOKENS, BLOCK_HEADS, BLOCK_HALF, 2)))
        turned = tl.interleave(a * c - b * s, b * c + a * s)
        tl.store(y + col * out_feature, turned.to(out_ptr.dtype.element_ty), mask)
    else:
        mask = inside & (pair < half)
        a = tl.load(x + pair * input_feature, mask, other=0.0).to(OPMATH)
        b = tl.load(x + (half + pair) * input_feature, mask, other=0.0).to(OPMATH)
        tl.store(y + pair * out_feature, (a * c - b * s).to(out_ptr.dtype.element_ty), mask)
        tl.store(
            y + (half + pair) * out_feature, (b * c + a * s).to(out_ptr.dtype.element_ty), mask
        )
    if BLOCK_REST > 0:
        col = 2 * half + tl.arange(0, BLOCK_REST)[None, None, :]
        mask = inside & (col < features)
        tl.store(y + col * out_feature, tl.load(x + col * input_feature, mask, other=0.0), mask)


def _sample(features, dtype, device):
    x = torch.randn(2, 2048, 32, features, dtype=dtype, device=device).transpose(1, 2)
    angles = torch.ones(2048, features // 2, dtype=dtype, device=device)
    return lambda: rotary(x, angles, angles, False, False)


TUNABLE = Tunable("rotary", heuristics.rotary_tiles, _sample)


def rotary(input: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    out = torch.empty_like(input)
    if not input.numel():
        return out
    batches, heads, tokens, features = input.shape
    half = cos.shape[-1]
    cos, sin = (t if t.stride(-1) == 1 or half <= 1 else t.contiguous() for t in (cos, sin))
    config = TUNABLE(
        2 * half, input.element_size()
    )  # what is rotated: its halves are what a thread reads 16 bytes of
    rows = config.blocks["BLOCK_M"]
    tile = dict(BLOCK_HEADS=min(power_of_two(heads), rows))
    tile["BLOCK_TOKENS"] = min(rows // tile["BLOCK_HEADS"], power_of_two(tokens))
    rest = features - 2 * half
    with on_device([input]):
        rotary_kernel[
            (batches * cdiv(tokens, tile["BLOCK_TOKENS"]) * cdiv(heads, tile["BLOCK_HEADS"]),)
        ](
            input,
            cos,
            sin,
            out,
            heads,
            tokens,
            features,
            half,
            *input.stride(),
            *out.stride(),
            *(
                stride
                for t in (cos, sin)
                for stride in (t.stride(0) if t.dim() == 3 else 0, t.stride(-2))
            ),
            INTERLEAVED=interleaved,
            INVERSE=inverse,
            OPMATH=tl_opmath_dtype(input.dtype),
            BLOCK_HALF=power_of_two(half),
            BLOCK_REST=power_of_two(rest) if rest else 0,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **tile,
        )
    return out


OPS = {"rotary": rotary}
