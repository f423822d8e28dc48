"""Dropout whose mask is a function of the seed and an element's place alone: any split of a tensor drops what the whole does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import as_rows, on_device, tl_opmath_dtype
from .launch_config import Tunable, cdiv


@triton.jit
def dropout_kernel(
    input_ptr,
    seed_ptr,
    out_ptr,
    M,
    N,
    input_stride,
    first_row: tl.int64,
    first_group,
    SHIFT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SCALE: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Philox4x32 with 7 rounds (Salmon et al. 2011), one call for four neighbours: tiles begin where a group of four does, SHIFT
    columns before the tensor's own first."""
    tiles = tl.cdiv(N + SHIFT, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    tile = tl.program_id(0) % tiles
    col = tile * BLOCK_N + tl.arange(0, BLOCK_N)[None, :] - SHIFT
    mask = (row < M) & (col >= 0) & (col < N)
    group = (first_group + tile * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)[None, :]).to(
        tl.uint32
    )
    where = row + first_row
    a, b, c, d = tl.philox(
        tl.load(seed_ptr), group, where.to(tl.uint32), (where >> 32).to(tl.uint32), group * 0, 7
    )
    random = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    x = tl.load(input_ptr + row * input_stride + col, mask, other=0.0).to(OPMATH)
    y = tl.where(random >= THRESHOLD, x * SCALE, 0)
    tl.store(out_ptr + row * N + col, y.to(out_ptr.dtype.element_ty), mask)


def _sample(features, dtype, device):
    x, seed = (
        torch.randn(4096, features, dtype=dtype, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    return lambda: dropout(x, seed, 0.1, 0, 0)


TUNABLE = Tunable("dropout", heuristics.dropout_tiles, _sample)


def dropout(input: Tensor, seed: Tensor, p: float, row: int, column: int) -> Tensor:
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
            SHIFT=shift,
            THRESHOLD=threshold,
            SCALE=1 / (1 - p),
            OPMATH=tl_opmath_dtype(input.dtype),
            **config.options(),
        )
    return out


OPS = {"dropout": dropout}
