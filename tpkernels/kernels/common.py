"""What the launchers share: row views, accumulation types and the sum of partial_sums sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_config import cdiv


def tl_opmath_dtype(dtype: torch.dtype) -> tl.dtype:
    """What the kernels calculate in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def as_rows(tensor: Tensor) -> Tensor:
    """[..., N] -> [M, N] with unit stride along N; a copy only where a view cannot be had."""
    if tensor.dim() != 2:
        tensor = (
            tensor.reshape(-1, tensor.shape[-1])
            if tensor.numel()
            else tensor.new_empty(tensor.shape[:-1].numel(), tensor.shape[-1])
        )
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def on_device(tensors: Iterable[Tensor | None]) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: this makes it the tensors'."""
    tensor = next(t for t in tensors if t is not None)
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@triton.jit
def sum_partials_kernel(
    partial_sums_ptr,
    first_out_ptr,
    second_out_ptr,
    num_splits,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """first_out_ptr [N] (and second_out_ptr [N]) = partial_sums_ptr [num_splits, 1 or 2, N] added up in one fixed order."""
    width = N * 2 if second_out_ptr is not None else N
    col = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), partial_sums_ptr.dtype.element_ty)
    for start in range(0, num_splits, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)[:, None]
        total += tl.load(
            partial_sums_ptr + row.to(tl.int64) * width + col,
            (row < num_splits) & (col < width),
            other=0.0,
        )
    value = tl.sum(total, 0).to(first_out_ptr.dtype.element_ty)
    tl.store(first_out_ptr + col, value, col < N)
    if second_out_ptr is not None:
        tl.store(second_out_ptr + col - N, value, (col >= N) & (col < width))


def sum_partials(partial_sums: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """partial_sums [P, K, N] with K of at most 2 -> K tensors [N], which share no storage."""
    num_splits, count, N = partial_sums.shape
    out = [partial_sums.new_empty(N, dtype=dtype) for _ in range(count)]
    if count and N:
        with on_device([partial_sums]):
            grid = (cdiv(count * N, 32),)
            sum_partials_kernel[grid](
                partial_sums,
                out[0],
                out[1] if count == 2 else None,
                num_splits,
                N,
                BLOCK_M=64,
                BLOCK_N=32,
            )
    return out
