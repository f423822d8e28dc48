"""Helpers of all kernels: views as rows, opmath dtypes, the sum of partial sums.

Names in kernels and launchers:

- M, N, K are sizes: M rows and N columns of a tensor [M, N]; a GEMM multiplies [M, K] by [K, N].
- BLOCK_M, BLOCK_N, BLOCK_K are a tile's sizes; GROUP_M is how many rows of tiles share L2.
- x_ptr is a pointer to x; its last dimension has unit stride, x_stride is the stride of its rows.
- row and col are the tile's indices: [BLOCK_M] or [BLOCK_M, 1], [BLOCK_N] or [1, BLOCK_N].
- OPMATH is the dtype of the arithmetic, as in at::opmath_type.
- num_splits programs share a sum over rows; `sum_partials` adds up their partial_sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_config import cdiv

SUM_BLOCKS: dict[str, Any] = dict(BLOCK_M=64, BLOCK_N=32)  # of sum_partials_kernel


def tl_opmath_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of the arithmetic in a kernel on `dtype`."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of partial sums and statistics of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def as_rows(tensor: Tensor) -> Tensor:
    """Return a tensor [..., N] as [M, N] with unit stride along N.

    It is a view where the strides allow it, a copy otherwise.
    """
    N = tensor.shape[-1]
    if tensor.dim() != 2 and tensor.numel():
        tensor = tensor.reshape(-1, N)
    elif tensor.dim() != 2:  # reshape cannot infer -1 without elements
        tensor = tensor.new_empty(tensor.shape[:-1].numel(), N)
    return tensor if tensor.stride(-1) == 1 or N <= 1 else tensor.contiguous()


def as_vector(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor [N] with unit stride, a copy where it has another."""
    return None if tensor is None else tensor.contiguous()


def on_device(tensors: Iterable[Tensor | None]) -> contextlib.AbstractContextManager:
    """Make the tensors' device the current one, on which Triton launches."""
    tensor = next(t for t in tensors if t is not None)
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def sum_partials_kernel(
    partial_sums_ptr,  # [num_splits, 1 or 2, N]
    first_out_ptr,  # [N]
    second_out_ptr,  # [N], or None
    num_splits,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up the partial sums in one fixed order."""
    width = N * 2 if second_out_ptr is not None else N
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), partial_sums_ptr.dtype.element_ty)
    for start in range(0, num_splits, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)[:, None]
        at = partial_sums_ptr + row.to(tl.int64) * width + col
        total += tl.load(at, (row < num_splits) & (col < width), other=0.0)
    value = tl.sum(total, 0).to(first_out_ptr.dtype.element_ty)
    tl.store(first_out_ptr + col, value, col < N)
    if second_out_ptr is not None:
        tl.store(second_out_ptr + col - N, value, (col >= N) & (col < width))


def sum_partials(partial_sums: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the sums over the first dimension as tensors [N] that share no storage.

    Args:
        partial_sums: [num_splits, sums, N] with at most two sums.
        dtype: of the results.
    """
    num_splits, count, N = partial_sums.shape
    out = [partial_sums.new_empty(N, dtype=dtype) for _ in range(count)]
    if not count or not N:
        return out
    second = out[1] if count == 2 else None
    grid = (cdiv(count * N, SUM_BLOCKS["BLOCK_N"]),)
    with on_device([partial_sums]):
        sum_partials_kernel[grid](partial_sums, out[0], second, num_splits, N, **SUM_BLOCKS)
    return out
