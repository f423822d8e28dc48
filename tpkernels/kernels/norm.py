"""Triton kernels of RMSNorm and LayerNorm, forward and backward, with the residual added before.

h = input + residual, x = (h - mean) * rstd and out = x * weight + bias, where mean is 0 for
RMSNorm (Zhang and Sennrich 2019) and rstd = 1 / sqrt(mean((h - mean)^2) + eps). The gradients,
with dy = grad * weight:

    d_h = rstd * (dy - x * mean(dy * x) - mean(dy)) + grad_sum        (no mean(dy) for RMSNorm)
    d_weight = sum over rows of grad * x,  d_bias = sum over rows of grad

grad_sum is the gradient that h gets as the next residual. Each tensor crosses memory once, but
for rows that do not fit in registers (the `long` kernels).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import as_rows, as_vector, on_device, opmath_dtype, sum_partials, tl_opmath_dtype
from .launch_config import Tunable, cdiv


@triton.jit
def norm_kernel(
    input_ptr,  # [M, N]
    residual_ptr,  # [M, N], or None
    weight_ptr,  # [N], or None
    bias_ptr,  # [N], or None
    out_ptr,  # [M, N], contiguous
    sum_ptr,  # [M, N], contiguous: input + residual, if there is a residual
    mean_ptr,  # [M], unless RMS
    rstd_ptr,  # [M]
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
    """Normalize whole rows in registers, BLOCK_N >= N."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < M
    rows = row[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    mask = inside[:, None] & (col < N)
    h = tl.load(input_ptr + rows * input_stride + col, mask, other=0.0)
    # Parameters are loaded before the reductions, because those make all threads wait.
    if weight_ptr is not None:
        w = tl.load(weight_ptr + col, col < N, other=0.0)
    if bias_ptr is not None:
        b = tl.load(bias_ptr + col, col < N, other=0.0)
    if residual_ptr is not None:
        h = h.to(OPMATH)
        added = tl.load(residual_ptr + rows * residual_stride + col, mask, other=0.0).to(OPMATH)
        h = (h + added).to(out_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * N + col, h, mask)
    x = h.to(OPMATH)
    if not RMS:
        mean = tl.sum(x, 1) / N
        tl.store(mean_ptr + row, mean, inside)
        x = tl.where(mask, x - mean[:, None], 0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / N + EPS)
    tl.store(rstd_ptr + row, rstd, inside)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= w.to(OPMATH)
    if bias_ptr is not None:
        y += b.to(OPMATH)
    tl.store(out_ptr + rows * N + col, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def norm_long_kernel(
    input_ptr,  # [M, N]
    residual_ptr,  # [M, N], or None
    weight_ptr,  # [N], or None
    bias_ptr,  # [N], or None
    out_ptr,  # [M, N], contiguous
    sum_ptr,  # [M, N], contiguous: input + residual, if there is a residual
    mean_ptr,  # [M], unless RMS
    rstd_ptr,  # [M]
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
    """Normalize rows that do not fit in registers, block by block.

    The sum is read a second time, mostly from L2. Blocks' means and squared deviations are merged
    as by Chan, Golub and LeVeque 1979, so that nothing cancels.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < M
    rows = row[:, None]
    mean = tl.zeros((BLOCK_M,), OPMATH)
    squares = tl.zeros((BLOCK_M,), OPMATH)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        mask = inside[:, None] & (col < N)
        h = tl.load(input_ptr + rows * input_stride + col, mask, other=0.0)
        if residual_ptr is not None:
            h = h.to(OPMATH)
            added = tl.load(residual_ptr + rows * residual_stride + col, mask, other=0.0).to(OPMATH)
            h = (h + added).to(out_ptr.dtype.element_ty)
            tl.store(sum_ptr + rows * N + col, h, mask)
        x = h.to(OPMATH)
        if not RMS:
            count = tl.minimum(N - start, BLOCK_N)
            block_mean = tl.sum(x, 1) / count
            x = tl.where(mask, x - block_mean[:, None], 0)
            delta = block_mean - mean
            share = count.to(OPMATH) / (start + count)
            mean += delta * share
            squares += delta * delta * share * start
        squares += tl.sum(x * x, 1)
    rstd = tl.rsqrt(squares / N + EPS)
    tl.store(rstd_ptr + row, rstd, inside)
    if not RMS:
        tl.store(mean_ptr + row, mean, inside)
    if residual_ptr is not None:
        tl.debug_barrier()  # this program's other threads have written the sum
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        mask = inside[:, None] & (col < N)
        if residual_ptr is not None:
            x = tl.load(sum_ptr + rows * N + col, mask, other=0.0).to(OPMATH)
        else:
            x = tl.load(input_ptr + rows * input_stride + col, mask, other=0.0).to(OPMATH)
        y = (x - mean[:, None]) * rstd[:, None]
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + col, col < N, other=0.0).to(OPMATH)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + col, col < N, other=0.0).to(OPMATH)
        tl.store(out_ptr + rows * N + col, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def norm_backward_kernel(
    grad_ptr,  # [M, N]
    grad_sum_ptr,  # [M, N], or None
    sum_ptr,  # [M, N]
    weight_ptr,  # [N], or None
    mean_ptr,  # [M], unless RMS
    rstd_ptr,  # [M]
    out_ptr,  # [M, N], contiguous: gradient of the sum
    partial_sums_ptr,  # [num_splits, WEIGHT_GRAD + BIAS_GRAD, N], for `sum_partials`
    M,
    N,
    num_splits,
    grad_stride,
    grad_sum_stride,
    sum_stride,
    RMS: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the gradients of every num_splits-th tile of whole rows, BLOCK_N >= N.

    A program's share of the weight's and bias's gradients stays in registers. There are no
    atomics, because their order would vary.
    """
    col = tl.arange(0, BLOCK_N)[None, :]
    if weight_ptr is not None:
        w = tl.load(weight_ptr + col, col < N, other=0.0).to(OPMATH)
    weight_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    bias_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_splits):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < M
        rows = row[:, None]
        mask = inside[:, None] & (col < N)
        dy = tl.load(grad_ptr + rows * grad_stride + col, mask, other=0.0).to(OPMATH)
        x = tl.load(sum_ptr + rows * sum_stride + col, mask, other=0.0).to(OPMATH)
        rstd = tl.load(rstd_ptr + row, inside, other=0.0)[:, None]
        if grad_sum_ptr is not None:  # loaded before the reductions, which make all threads wait
            grad_sum = tl.load(grad_sum_ptr + rows * grad_sum_stride + col, mask, other=0.0)
        if not RMS:
            x -= tl.load(mean_ptr + row, inside, other=0.0)[:, None]
        x *= rstd
        if WEIGHT_GRAD:
            weight_sum += dy * x
        if BIAS_GRAD:
            bias_sum += dy
        if weight_ptr is not None:
            dy *= w
        dx = dy - x * (tl.sum(dy * x, 1) / N)[:, None]
        if not RMS:
            dx -= (tl.sum(dy, 1) / N)[:, None]
        dx *= rstd
        if grad_sum_ptr is not None:
            dx += grad_sum.to(OPMATH)
        tl.store(out_ptr + rows * N + col, dx.to(out_ptr.dtype.element_ty), mask)
    column = tl.arange(0, BLOCK_N)
    at = partial_sums_ptr + tl.program_id(0) * (WEIGHT_GRAD + BIAS_GRAD) * N + column
    if WEIGHT_GRAD:
        tl.store(at, tl.sum(weight_sum, 0), column < N)
        at += N
    if BIAS_GRAD:
        tl.store(at, tl.sum(bias_sum, 0), column < N)


@triton.jit
def norm_backward_long_kernel(
    grad_ptr,  # [M, N]
    grad_sum_ptr,  # [M, N], or None
    sum_ptr,  # [M, N]
    weight_ptr,  # [N], or None
    mean_ptr,  # [M], unless RMS
    rstd_ptr,  # [M]
    out_ptr,  # [M, N], contiguous: gradient of the sum
    partial_sums_ptr,  # [num_splits, WEIGHT_GRAD + BIAS_GRAD, N], for `sum_partials`
    M,
    N,
    num_splits,
    grad_stride,
    grad_sum_stride,
    sum_stride,
    RMS: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the gradients of rows that do not fit in registers, a tile of rows block by block.

    `grad` and `sum` are read a second time and the partial sums are kept in memory, all of it
    mostly in L2.
    """
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), num_splits):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < M
        rows = row[:, None]
        rstd = tl.load(rstd_ptr + row, inside, other=0.0)[:, None]
        if not RMS:
            mean = tl.load(mean_ptr + row, inside, other=0.0)[:, None]
        mean_dy_x = tl.zeros((BLOCK_M,), OPMATH)
        mean_dy = tl.zeros((BLOCK_M,), OPMATH)
        for start in range(0, N, BLOCK_N):
            col = start + tl.arange(0, BLOCK_N)[None, :]
            mask = inside[:, None] & (col < N)
            dy = tl.load(grad_ptr + rows * grad_stride + col, mask, other=0.0).to(OPMATH)
            x = tl.load(sum_ptr + rows * sum_stride + col, mask, other=0.0).to(OPMATH)
            if not RMS:
                x -= mean
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + col, col < N, other=0.0).to(OPMATH)
            mean_dy_x += tl.sum(dy * (x * rstd), 1)
            mean_dy += tl.sum(dy, 1)
        mean_dy_x /= N
        mean_dy /= N
        tl.debug_barrier()  # other threads have written the previous tile's partial sums
        for start in range(0, N, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            col = column[None, :]
            mask = inside[:, None] & (col < N)
            dy = tl.load(grad_ptr + rows * grad_stride + col, mask, other=0.0).to(OPMATH)
            x = tl.load(sum_ptr + rows * sum_stride + col, mask, other=0.0).to(OPMATH)
            if not RMS:
                x -= mean
            x *= rstd
            at = partial_sums_ptr + tl.program_id(0) * (WEIGHT_GRAD + BIAS_GRAD) * N + column
            started = (column < N) & (tile >= num_splits)
            if WEIGHT_GRAD:
                tl.store(at, tl.load(at, started, other=0.0) + tl.sum(dy * x, 0), column < N)
                at += N
            if BIAS_GRAD:
                tl.store(at, tl.load(at, started, other=0.0) + tl.sum(dy, 0), column < N)
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + col, col < N, other=0.0).to(OPMATH)
            dx = dy - x * mean_dy_x[:, None]
            if not RMS:
                dx -= mean_dy[:, None]
            dx *= rstd
            if grad_sum_ptr is not None:
                dx += tl.load(grad_sum_ptr + rows * grad_sum_stride + col, mask, other=0.0).to(
                    OPMATH
                )
            tl.store(out_ptr + rows * N + col, dx.to(out_ptr.dtype.element_ty), mask)


def _sample(features: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    x = torch.randn(4096, features, dtype=dtype, device=device)
    weight = torch.ones(features, dtype=dtype, device=device)
    return lambda: norm(x, x, weight, None, 1e-6, True)


def _sample_backward(
    features: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    x = torch.randn(4096, features, dtype=dtype, device=device)
    weight = torch.ones(features, dtype=dtype, device=device)
    rstd = torch.ones(4096, dtype=opmath_dtype(dtype), device=device)
    return lambda: norm_backward(x, x, x, weight, rstd[:0], rstd, True, True, False)


FORWARD = Tunable("norm", heuristics.norm_tiles, _sample)
BACKWARD = Tunable("norm_backward", heuristics.norm_backward_tiles, _sample_backward)


def norm(
    input: Tensor,  # [..., N]
    residual: Tensor | None,  # [..., N]
    weight: Tensor | None,  # [N]
    bias: Tensor | None,  # [N]
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the normalized sum [..., N], the sum [..., N], mean [M] and rstd [M].

    The sum is [0] without a residual, and the mean is [0] for RMSNorm.
    """
    x = as_rows(input)
    M, N = x.shape
    out = input.new_empty(input.shape)
    sum = input.new_empty(0 if residual is None else input.shape)
    rstd = input.new_empty(M, dtype=opmath_dtype(input.dtype))
    mean = rstd.new_empty(0 if rms else M)
    if not input.numel():
        return out, sum, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    r = None if residual is None else as_rows(residual)
    config = FORWARD(N, input.element_size())
    kernel = norm_kernel if config.blocks["BLOCK_N"] >= N else norm_long_kernel
    grid = (cdiv(M, config.blocks["BLOCK_M"]),)
    tensors = (x, r, as_vector(weight), as_vector(bias), out, sum, mean, rstd)
    strides = (x.stride(0), 0 if r is None else r.stride(0))
    options = config.options(EPS=eps, RMS=rms, OPMATH=tl_opmath_dtype(input.dtype))
    with on_device([x]):
        kernel[grid](*tensors, M, N, *strides, **options)
    return out, sum, mean, rstd


def norm_backward(
    grad: Tensor,  # [..., N]
    grad_sum: Tensor | None,  # [..., N]
    sum: Tensor,  # [..., N]
    weight: Tensor | None,  # [N]
    mean: Tensor,  # [M], or [0] for RMSNorm
    rstd: Tensor,  # [M]
    rms: bool,
    weight_grad: bool,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of the sum and, as asked for, of weight and bias."""
    g, h = as_rows(grad), as_rows(sum)
    s = None if grad_sum is None else as_rows(grad_sum)
    M, N = h.shape
    out = sum.new_empty(sum.shape)
    config = BACKWARD(N, sum.element_size())
    sums = weight_grad + bias_grad
    num_splits = heuristics.norm_backward_splits(M, config.blocks["BLOCK_M"], sums)
    partial_sums = rstd.new_empty(num_splits, sums, N)
    kernel = norm_backward_kernel if config.blocks["BLOCK_N"] >= N else norm_backward_long_kernel
    if not sum.numel():
        partial_sums.zero_()
    else:
        vectors = as_vector(weight), as_vector(mean), as_vector(rstd)
        tensors = (g, s, h, *vectors, out, partial_sums)
        strides = (g.stride(0), 0 if s is None else s.stride(0), h.stride(0))
        options = config.options(
            RMS=rms,
            WEIGHT_GRAD=weight_grad,
            BIAS_GRAD=bias_grad,
            OPMATH=tl_opmath_dtype(sum.dtype),
        )
        with on_device([h]):
            kernel[(num_splits,)](*tensors, M, N, num_splits, *strides, **options)
    return [out, *sum_partials(partial_sums, sum.dtype if weight is None else weight.dtype)]


OPS = {f.__name__: f for f in (norm, norm_backward)}
