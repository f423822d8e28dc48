"""RMSNorm and LayerNorm with the residual addition before them, and their gradients: each tensor crosses memory once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import as_rows, on_device, opmath_dtype, sum_partials, tl_opmath_dtype
from .launch_config import Tunable, cdiv


@triton.jit
def norm_kernel(
    input_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    N,
    input_stride,
    residual_stride,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Whole rows in registers: BLOCK_N >= N. `out_ptr` and `sum_ptr` (the sum, with a residual_ptr) are contiguous."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < M
    r = row[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    mask = inside[:, None] & (col < N)
    h = tl.load(input_ptr + r * input_stride + col, mask, other=0.0)
    if weight_ptr is not None:  # loads before the sums, which all threads wait for
        w = tl.load(weight_ptr + col, col < N, other=0.0)
    if bias_ptr is not None:
        b = tl.load(bias_ptr + col, col < N, other=0.0)
    if residual_ptr is not None:
        h = (
            h.to(OPMATH)
            + tl.load(residual_ptr + r * residual_stride + col, mask, other=0.0).to(OPMATH)
        ).to(out_ptr.dtype.element_ty)
        tl.store(sum_ptr + r * N + col, h, mask)
    x = h.to(OPMATH)
    if not RMS:
        mu = tl.sum(x, 1) / N
        tl.store(mean_ptr + row, mu, inside)
        x = tl.where(mask, x - mu[:, None], 0)
    scale = tl.rsqrt(tl.sum(x * x, 1) / N + EPS)
    tl.store(rstd_ptr + row, scale, inside)
    y = x * scale[:, None]
    if weight_ptr is not None:
        y *= w.to(OPMATH)
    if bias_ptr is not None:
        y += b.to(OPMATH)
    tl.store(out_ptr + r * N + col, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def norm_long_kernel(
    input_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    sum_ptr,
    mean_ptr,
    rstd_ptr,
    M,
    N,
    input_stride,
    residual_stride,
    EPS: tl.constexpr,
    RMS: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows that do not fit in registers, block by block: the sum is read a second time, mostly from L2.

    Blocks' means and squared deviations are merged as by Chan, Golub, LeVeque 1979, so that nothing cancels.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < M
    r = row[:, None]
    mu = tl.zeros((BLOCK_M,), OPMATH)
    squares = tl.zeros((BLOCK_M,), OPMATH)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        mask = inside[:, None] & (col < N)
        h = tl.load(input_ptr + r * input_stride + col, mask, other=0.0)
        if residual_ptr is not None:
            h = (
                h.to(OPMATH)
                + tl.load(residual_ptr + r * residual_stride + col, mask, other=0.0).to(OPMATH)
            ).to(out_ptr.dtype.element_ty)
            tl.store(sum_ptr + r * N + col, h, mask)
        x = h.to(OPMATH)
        if not RMS:
            count = tl.minimum(N - start, BLOCK_N)
            block = tl.sum(x, 1) / count
            x = tl.where(mask, x - block[:, None], 0)
            delta = block - mu
            share = count.to(OPMATH) / (start + count)
            mu += delta * share
            squares += delta * delta * share * start
        squares += tl.sum(x * x, 1)
    scale = tl.rsqrt(squares / N + EPS)
    tl.store(rstd_ptr + row, scale, inside)
    if not RMS:
        tl.store(mean_ptr + row, mu, inside)
    if residual_ptr is not None:
        tl.debug_barrier()  # what this program's other threads wrote to `sum_ptr`
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        mask = inside[:, None] & (col < N)
        if residual_ptr is not None:
            x = tl.load(sum_ptr + r * N + col, mask, other=0.0).to(OPMATH)
        else:
            x = tl.load(input_ptr + r * input_stride + col, mask, other=0.0).to(OPMATH)
        y = (x - mu[:, None]) * scale[:, None]
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + col, col < N, other=0.0).to(OPMATH)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, col < N, other=0.0).to(OPMATH)
        tl.store(out_ptr + r * N + col, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def norm_backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    sum_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    out_ptr,
    partial_sums_ptr,
    M,
    N,
    num_splits,
    grad_stride,
    grad_sum_stride,
    total_stride,
    RMS: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every num_splits-th tile of whole rows, BLOCK_N >= N: the program's share of the weight_ptr's and bias_ptr's gradient stays in registers.

    partial_sums_ptr [num_splits, WEIGHT_GRAD + BIAS_GRAD, N]: what `sum_partials` adds up. No atomics: their order would vary.
    """
    col = tl.arange(0, BLOCK_N)[None, :]
    if weight_ptr is not None:
        w = tl.load(weight_ptr + col, col < N, other=0.0).to(OPMATH)
    weight_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_splits):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < M
        r = row[:, None]
        mask = inside[:, None] & (col < N)
        dy = tl.load(grad_ptr + r * grad_stride + col, mask, other=0.0).to(OPMATH)
        x = tl.load(sum_ptr + r * total_stride + col, mask, other=0.0).to(OPMATH)
        scale = tl.load(rstd_ptr + row, inside, other=0.0)[:, None]
        if grad_sum_ptr is not None:  # before the sums, which all threads wait for
            passed = tl.load(grad_sum_ptr + r * grad_sum_stride + col, mask, other=0.0)
        if not RMS:
            x -= tl.load(mean_ptr + row, inside, other=0.0)[:, None]
        x *= scale
        if WEIGHT_GRAD:
            weight_sum += dy * x
        if BIAS_GRAD:
            bias_sum += dy
        if weight_ptr is not None:
            dy *= w
        dx = dy - x * (tl.sum(dy * x, 1) / N)[:, None]
        if not RMS:
            dx -= (tl.sum(dy, 1) / N)[:, None]
        dx *= scale
        if grad_sum_ptr is not None:
            dx += passed.to(OPMATH)
        tl.store(out_ptr + r * N + col, dx.to(out_ptr.dtype.element_ty), mask)
    column = tl.arange(0, BLOCK_N)
    place = partial_sums_ptr + tl.program_id(0) * (WEIGHT_GRAD + BIAS_GRAD) * N + column
    if WEIGHT_GRAD:
        tl.store(place, tl.sum(weight_sum, 0), column < N)
        place += N
    if BIAS_GRAD:
        tl.store(place, tl.sum(bias_sum, 0), column < N)


@triton.jit
def norm_backward_long_kernel(
    grad_ptr,
    grad_sum_ptr,
    sum_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    out_ptr,
    partial_sums_ptr,
    M,
    N,
    num_splits,
    grad_stride,
    grad_sum_stride,
    total_stride,
    RMS: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same for rows that do not fit in registers, a tile of rows block by block: `grad_ptr` and `sum_ptr` are read a second time and
    the partial_sums_ptr sums are kept in memory, all of it mostly L2."""
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_splits):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < M
        r = row[:, None]
        scale = tl.load(rstd_ptr + row, inside, other=0.0)[:, None]
        if not RMS:
            mu = tl.load(mean_ptr + row, inside, other=0.0)[:, None]
        along = tl.zeros((BLOCK_M,), OPMATH)
        across = tl.zeros((BLOCK_M,), OPMATH)
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)[None, :]
            mask = inside[:, None] & (col < N)
            dy = tl.load(grad_ptr + r * grad_stride + col, mask, other=0.0).to(OPMATH)
            x = tl.load(sum_ptr + r * total_stride + col, mask, other=0.0).to(OPMATH)
            if not RMS:
                x -= mu
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + col, col < N, other=0.0).to(OPMATH)
            along += tl.sum(dy * (x * scale), 1)
            across += tl.sum(dy, 1)
        along /= N
        across /= N
        tl.debug_barrier()  # what this program's other threads wrote to `partial_sums_ptr` for the tile before
        for start in range(0, N, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            col = column[None, :]
            mask = inside[:, None] & (col < N)
            dy = tl.load(grad_ptr + r * grad_stride + col, mask, other=0.0).to(OPMATH)
            x = tl.load(sum_ptr + r * total_stride + col, mask, other=0.0).to(OPMATH)
            if not RMS:
                x -= mu
            x *= scale
            place = partial_sums_ptr + tl.program_id(0) * (WEIGHT_GRAD + BIAS_GRAD) * N + column
            started = (column < N) & (tile >= num_splits)
            if WEIGHT_GRAD:
                tl.store(place, tl.load(place, started, other=0.0) + tl.sum(dy * x, 0), column < N)
                place += N
            if BIAS_GRAD:
                tl.store(place, tl.load(place, started, other=0.0) + tl.sum(dy, 0), column < N)
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + col, col < N, other=0.0).to(OPMATH)
            dx = dy - x * along[:, None]
            if not RMS:
                dx -= across[:, None]
            dx *= scale
            if grad_sum_ptr is not None:
                dx += tl.load(grad_sum_ptr + r * grad_sum_stride + col, mask, other=0.0).to(OPMATH)
            tl.store(out_ptr + r * N + col, dx.to(out_ptr.dtype.element_ty), mask)


def _sample(features, dtype, device):
    x, w = (
        torch.randn(4096, features, dtype=dtype, device=device),
        torch.ones(features, dtype=dtype, device=device),
    )
    return lambda: norm(x, x, w, None, 1e-6, True)


def _sample_backward(features, dtype, device):
    x, w = (
        torch.randn(4096, features, dtype=dtype, device=device),
        torch.ones(features, dtype=dtype, device=device),
    )
    rstd = torch.ones(4096, dtype=opmath_dtype(dtype), device=device)
    return lambda: norm_backward(x, x, x, w, rstd[:0], rstd, True, True, False)


FORWARD = Tunable("norm", heuristics.norm_tiles, _sample)
BACKWARD = Tunable("norm_backward", heuristics.norm_backward_tiles, _sample_backward)


def norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = as_rows(input)
    M, N = x.shape
    out, none = input.new_empty(input.shape), input.new_empty(0)
    total = none if residual is None else input.new_empty(input.shape)
    rstd = input.new_empty(M, dtype=opmath_dtype(input.dtype))
    mean = rstd.new_empty(0 if rms else M)
    if not input.numel():
        return out, total, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    r = None if residual is None else as_rows(residual)
    config = FORWARD(N, input.element_size())
    kernel = norm_kernel if config.blocks["BLOCK_N"] >= N else norm_long_kernel
    with on_device([x]):
        kernel[(cdiv(M, config.blocks["BLOCK_M"]),)](
            x,
            r,
            weight,
            bias,
            out,
            total,
            mean,
            rstd,
            M,
            N,
            x.stride(0),
            0 if r is None else r.stride(0),
            EPS=eps,
            RMS=rms,
            OPMATH=tl_opmath_dtype(input.dtype),
            **config.options(),
        )
    return out, total, mean, rstd


def norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> list[Tensor]:
    g, h = as_rows(grad), as_rows(sum)
    M, N = h.shape
    out = sum.new_empty(sum.shape)
    config = BACKWARD(N, sum.element_size())
    sums = weight_grad + bias_grad
    num_splits = heuristics.norm_backward_splits(M, config.blocks["BLOCK_M"], sums)
    partial_sums = rstd.new_empty(num_splits, sums, N)
    if not sum.numel():
        partial_sums.zero_()
    else:
        s = None if grad_sum is None else as_rows(grad_sum)
        kernel = (
            norm_backward_kernel if config.blocks["BLOCK_N"] >= N else norm_backward_long_kernel
        )
        with on_device([h]):
            kernel[(num_splits,)](
                g,
                s,
                h,
                weight,
                mean,
                rstd,
                out,
                partial_sums,
                M,
                N,
                num_splits,
                g.stride(0),
                0 if s is None else s.stride(0),
                h.stride(0),
                RMS=rms,
                WEIGHT_GRAD=weight_grad,
                BIAS_GRAD=bias_grad,
                OPMATH=tl_opmath_dtype(sum.dtype),
                **config.options(),
            )
    return [out, *sum_partials(partial_sums, sum.dtype if weight is None else weight.dtype)]


OPS = {f.__name__: f for f in (norm, norm_backward)}
