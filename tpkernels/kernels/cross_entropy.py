"""What cross-entropy needs of a rank's columns of the logits, in one pass over them, and their gradient in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import as_rows, on_device, opmath_dtype, tl_opmath_dtype
from .launch_config import Tunable, cdiv


@triton.jit
def stats_kernel(
    logits_ptr,
    target_ptr,
    out_ptr,
    M,
    N,
    logits_stride,
    vocab_start_index,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax (Milakov and Gimelshein 2018), every lane for itself: no thread waits for another before the end of the row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < M
    lane_max = tl.full((BLOCK_M, BLOCK_N), float("-inf"), OPMATH)
    lane_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    lane_total = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        mask = inside[:, None] & (col < N)
        z = tl.load(logits_ptr + row[:, None] * logits_stride + col, mask, other=float("-inf")).to(
            OPMATH
        )
        lane_total += tl.where(mask, z, 0)
        scale = tl.where(
            z == lane_max, 1, tl.exp(-tl.abs(z - lane_max))
        )  # -inf - -inf would be NaN
        lane_sum = tl.where(z > lane_max, lane_sum * scale + 1, lane_sum + scale)
        lane_max = tl.maximum(lane_max, z, propagate_nan=tl.PropagateNan.ALL)
    nan = tl.sum((lane_max != lane_max).to(tl.int32), 1) > 0  # which tl.max does not tell
    row_max = tl.where(nan, float("nan"), tl.max(lane_max, 1))
    # A lane, or a whole row, without any logit above -inf has counted exp(-inf - -inf) as 1.
    lane_sum = tl.where(
        lane_max == float("-inf"), 0, lane_sum * tl.exp(lane_max - row_max[:, None])
    )
    tl.store(out_ptr + row, row_max, inside)
    tl.store(out_ptr + M + row, tl.sum(lane_sum, 1), inside)
    label = tl.load(target_ptr + row, inside, other=0).to(tl.int64) - vocab_start_index
    here = inside & (label >= 0) & (label < N)
    tl.store(
        out_ptr + 2 * M + row,
        tl.load(logits_ptr + row * logits_stride + label, here, other=0.0).to(OPMATH),
        inside,
    )
    tl.store(out_ptr + 3 * M + row, tl.sum(lane_total, 1), inside)


@triton.jit
def grad_kernel(
    logits_ptr,
    target_ptr,
    log_norm_ptr,
    scale_ptr,
    out_ptr,
    M,
    N,
    logits_stride,
    out_stride,
    vocab_start_index,
    ON_TARGET: tl.constexpr,
    EVERYWHERE: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`out_ptr` may be `logits_ptr`."""
    tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = row < M
    mask = inside & (col < N)
    factor = tl.load(scale_ptr + row, inside, other=0.0)
    label = tl.load(target_ptr + row, inside, other=0).to(tl.int64) - vocab_start_index
    # Rows that do not count are not read.
    z = tl.load(logits_ptr + row * logits_stride + col, mask & (factor != 0), other=0.0).to(OPMATH)
    p = tl.exp(z - tl.load(log_norm_ptr + row, inside, other=0.0)) - EVERYWHERE
    p = tl.where(factor == 0, 0, tl.where(col == label, p - ON_TARGET, p) * factor)
    tl.store(out_ptr + row * out_stride + col, p.to(out_ptr.dtype.element_ty), mask)


def _sample_inputs(features, dtype, device):
    logits = torch.randn(2048, features, dtype=dtype, device=device)
    return (
        logits,
        torch.zeros(2048, dtype=torch.int64, device=device),
        torch.ones(2048, dtype=opmath_dtype(dtype), device=device),
    )


def _sample_stats(features, dtype, device):
    logits, target, _ = _sample_inputs(features, dtype, device)
    return lambda: vocab_ce_stats(logits, target, 0)


def _sample_grad(features, dtype, device):
    logits, target, ones = _sample_inputs(features, dtype, device)
    return lambda: vocab_ce_grad(logits, target, ones, ones, 0, 1.0, 0.0)


STATS = Tunable("vocab_ce_stats", heuristics.cross_entropy_stats_tiles, _sample_stats)
GRAD = Tunable("vocab_ce_grad", heuristics.cross_entropy_grad_tiles, _sample_grad)


def _launch_grad(
    logits, target, log_norm, scale, out, vocab_start_index, on_target, everywhere
) -> None:
    M, N = logits.shape
    if not logits.numel():
        return
    config = GRAD(N, logits.element_size())
    grid = (cdiv(M, config.blocks["BLOCK_M"]) * cdiv(N, config.blocks["BLOCK_N"]),)
    with on_device([logits]):
        grad_kernel[grid](
            logits,
            target.contiguous(),
            log_norm.contiguous(),
            scale.contiguous(),
            out,
            M,
            N,
            logits.stride(0),
            out.stride(0),
            vocab_start_index,
            ON_TARGET=on_target,
            EVERYWHERE=everywhere,
            OPMATH=tl_opmath_dtype(logits.dtype),
            **config.options(),
        )


def vocab_ce_stats(logits: Tensor, target: Tensor, vocab_start_index: int) -> Tensor:
    z = as_rows(logits)
    M, N = z.shape
    out = (
        z.new_zeros(4, M, dtype=opmath_dtype(z.dtype))
        if not N
        else z.new_empty(4, M, dtype=opmath_dtype(z.dtype))
    )
    if not z.numel():
        out[0] = -torch.inf
        return out
    config = STATS(N, z.element_size())
    with on_device([z]):
        stats_kernel[(cdiv(M, config.blocks["BLOCK_M"]),)](
            z,
            target.contiguous(),
            out,
            M,
            N,
            z.stride(0),
            vocab_start_index,
            OPMATH=tl_opmath_dtype(z.dtype),
            **config.options(),
        )
    return out


def vocab_ce_grad(
    logits: Tensor,
    target: Tensor,
    log_norm: Tensor,
    scale: Tensor,
    vocab_start_index: int,
    on_target: float,
    everywhere: float,
) -> Tensor:
    out = logits.new_empty(logits.shape)
    _launch_grad(
        as_rows(logits), target, log_norm, scale, out, vocab_start_index, on_target, everywhere
    )
    return out


def vocab_ce_grad_(
    logits: Tensor,
    target: Tensor,
    log_norm: Tensor,
    scale: Tensor,
    vocab_start_index: int,
    on_target: float,
    everywhere: float,
) -> None:
    z = as_rows(logits)
    _launch_grad(z, target, log_norm, scale, z, vocab_start_index, on_target, everywhere)
    if z is not logits:  # no unit stride along the vocabulary: the gradient is in a copy
        logits.copy_(z)


OPS = {f.__name__: f for f in (vocab_ce_stats, vocab_ce_grad, vocab_ce_grad_)}
