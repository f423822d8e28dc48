"""Triton kernel of dropout whose mask depends on the seed and an element's position alone.

Any shard of a tensor therefore drops the same elements as the whole tensor does. The random
numbers are those of Philox4x32 with 7 rounds (Salmon et al. 2011).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import as_rows, on_device, tl_opmath_dtype
from .launch_config import Tunable, cdiv


@triton.jit
def dropout_kernel(
    input_ptr,  # [M, N]
    seed_ptr,  # [1]
    out_ptr,  # [M, N], contiguous
    M,
    N,
    input_stride,
    first_row: tl.int64,  # pyright: ignore[reportInvalidTypeForm]  # Triton reads it
    first_group,
    SHIFT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute out = input * SCALE where the random number is at least THRESHOLD, else 0.

    One call of Philox makes the numbers of a group of four neighbours, whose counter is the
    group's position. Tiles begin where a group does, SHIFT columns before the tensor.
    """
    tiles_n = tl.cdiv(N + SHIFT, BLOCK_N)
    row = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    tile = tl.program_id(0) % tiles_n
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :] - SHIFT
    mask = (row < M) & (col >= 0) & (col < N)
    group = first_group + tile * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)[None, :]
    group = group.to(tl.uint32)
    position = row + first_row
    seed = tl.load(seed_ptr)
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, group, low, high, group * 0, 7)
    random = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    x = tl.load(input_ptr + row * input_stride + col, mask, other=0.0).to(OPMATH)
    y = tl.where(random >= THRESHOLD, x * SCALE, 0)
    tl.store(out_ptr + row * N + col, y.to(out_ptr.dtype.element_ty), mask)


def _sample(features: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    x = torch.randn(4096, features, dtype=dtype, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: dropout(x, seed, 0.1, 0, 0)


TUNABLE = Tunable("dropout", heuristics.dropout_tiles, _sample)


def dropout(
    input: Tensor,  # [..., N]
    seed: Tensor,  # [1], int64
    p: float,
    row: int,
    column: int,
) -> Tensor:
    """Return `input` with a share `p` of its elements dropped and the others divided by 1 - p.

    `row` and `column` are the position of the first element in the whole tensor [M, N].
    """
    threshold = round(p * 2**32)
    if threshold == 2**32:
        return input.new_zeros(input.shape)
    out = input.new_empty(input.shape)
    if not input.numel():
        return out
    x = as_rows(input)
    M, N = x.shape
    group, shift = divmod(column, 4)
    config = TUNABLE(N, input.element_size())
    grid = (cdiv(M, config.blocks["BLOCK_M"]) * cdiv(N + shift, config.blocks["BLOCK_N"]),)
    with on_device([x]):
        dropout_kernel[grid](
            x,
            seed,
            out,
            M,
            N,
            x.stride(0),
            row,
            group,
            **config.options(
                SHIFT=shift,
                THRESHOLD=threshold,
                SCALE=1 / (1 - p),
                OPMATH=tl_opmath_dtype(input.dtype),
            ),
        )
    return out


OPS = {"dropout": dropout}
