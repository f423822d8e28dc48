"""Triton kernels of vocab-parallel cross-entropy on one rank's columns of the logits.

`vocab_ce_stats` computes what the ranks' all-reduces need in one pass over the logits,
`vocab_ce_grad` the logits' gradient in another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import as_rows, on_device, opmath_dtype, tl_opmath_dtype
from .launch_config import Tunable, cdiv


@triton.jit
def stats_kernel(
    logits_ptr,  # [M, N]
    target_ptr,  # [M], classes of the whole vocabulary
    out_ptr,  # [4, M]
    M,
    N,
    logits_stride,
    vocab_start_index,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute each row's maximum, sum of exp(logit - maximum), target's logit and sum of logits.

    The softmax is online (Milakov and Gimelshein 2018). Every lane keeps its own maximum and sum,
    so that no thread waits for another before the end of the row.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < M
    lane_max = tl.full((BLOCK_M, BLOCK_N), float("-inf"), OPMATH)
    lane_exp_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    lane_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    for start in range(0, N, BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)[None, :]
        mask = inside[:, None] & (col < N)
        at = logits_ptr + row[:, None] * logits_stride + col
        z = tl.load(at, mask, other=float("-inf")).to(OPMATH)
        lane_sum += tl.where(mask, z, 0)
        # Equal ones are told apart, because -inf - -inf would be NaN.
        scale = tl.where(z == lane_max, 1, tl.exp(-tl.abs(z - lane_max)))
        lane_exp_sum = tl.where(z > lane_max, lane_exp_sum * scale + 1, lane_exp_sum + scale)
        lane_max = tl.maximum(lane_max, z, propagate_nan=tl.PropagateNan.ALL)
    nan = tl.sum((lane_max != lane_max).to(tl.int32), 1) > 0  # tl.max does not propagate NaN
    row_max = tl.where(nan, float("nan"), tl.max(lane_max, 1))
    # A lane, or a whole row, without any logit above -inf has counted exp(-inf - -inf) as 1.
    empty = lane_max == float("-inf")
    lane_exp_sum = tl.where(empty, 0, lane_exp_sum * tl.exp(lane_max - row_max[:, None]))
    tl.store(out_ptr + row, row_max, inside)
    tl.store(out_ptr + M + row, tl.sum(lane_exp_sum, 1), inside)
    label = tl.load(target_ptr + row, inside, other=0).to(tl.int64) - vocab_start_index
    here = inside & (label >= 0) & (label < N)
    target_out = out_ptr + 2 * M + row
    target_logit = tl.load(logits_ptr + row * logits_stride + label, here, other=0.0)
    tl.store(target_out, target_logit.to(OPMATH), inside)
    tl.store(out_ptr + 3 * M + row, tl.sum(lane_sum, 1), inside)


@triton.jit
def grad_kernel(
    logits_ptr,  # [M, N]
    target_ptr,  # [M], classes of the whole vocabulary
    log_norm_ptr,  # [M], log of the sum of exp(logit) over the whole vocabulary
    scale_ptr,  # [M], the loss's gradient; 0 for rows that do not count
    out_ptr,  # [M, N], may be the logits
    M,
    N,
    logits_stride,
    out_stride,
    vocab_start_index,
    TARGET_PROBABILITY: tl.constexpr,
    UNIFORM_PROBABILITY: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute out = (softmax - q) * scale, with the smoothed target distribution q.

    q is UNIFORM_PROBABILITY everywhere, and TARGET_PROBABILITY more at the target.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = row < M
    mask = inside & (col < N)
    scale = tl.load(scale_ptr + row, inside, other=0.0)
    label = tl.load(target_ptr + row, inside, other=0).to(tl.int64) - vocab_start_index
    # Rows that do not count are not read.
    z = tl.load(logits_ptr + row * logits_stride + col, mask & (scale != 0), other=0.0).to(OPMATH)
    p = tl.exp(z - tl.load(log_norm_ptr + row, inside, other=0.0)) - UNIFORM_PROBABILITY
    p = tl.where(scale == 0, 0, tl.where(col == label, p - TARGET_PROBABILITY, p) * scale)
    tl.store(out_ptr + row * out_stride + col, p.to(out_ptr.dtype.element_ty), mask)


def _sample_inputs(
    features: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(2048, features, dtype=dtype, device=device)
    target = torch.zeros(2048, dtype=torch.int64, device=device)
    ones = torch.ones(2048, dtype=opmath_dtype(dtype), device=device)
    return logits, target, ones


def _sample_stats(features: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    logits, target, _ = _sample_inputs(features, dtype, device)
    return lambda: vocab_ce_stats(logits, target, 0)


def _sample_grad(features: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    logits, target, ones = _sample_inputs(features, dtype, device)
    return lambda: vocab_ce_grad(logits, target, ones, ones, 0, 0.0, features)


STATS = Tunable("vocab_ce_stats", heuristics.cross_entropy_stats_tiles, _sample_stats)
GRAD = Tunable("vocab_ce_grad", heuristics.cross_entropy_grad_tiles, _sample_grad)


def _launch_grad(
    logits: Tensor,  # [M, N]
    target: Tensor,  # [M]
    log_norm: Tensor,  # [M]
    scale: Tensor,  # [M]
    out: Tensor,  # [M, N], may be `logits`
    vocab_start_index: int,
    smoothing: float,
    num_classes: int,
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
            **config.options(
                TARGET_PROBABILITY=1 - smoothing,
                UNIFORM_PROBABILITY=smoothing / num_classes,
                OPMATH=tl_opmath_dtype(logits.dtype),
            ),
        )


def vocab_ce_stats(
    logits: Tensor,  # [M, N]
    target: Tensor,  # [M], classes of the whole vocabulary
    vocab_start_index: int,
) -> Tensor:
    """Return [4, M]: each row's maximum, sum of exp(logit - maximum), target's logit, sum.

    The target's logit is 0 where another rank holds it.
    """
    z = as_rows(logits)
    M, N = z.shape
    out = z.new_empty(4, M, dtype=opmath_dtype(z.dtype))
    if not z.numel():
        out.zero_()[0] = -torch.inf
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
            **config.options(OPMATH=tl_opmath_dtype(z.dtype)),
        )
    return out


def vocab_ce_grad(
    logits: Tensor,  # [M, N]
    target: Tensor,  # [M], classes of the whole vocabulary
    log_norm: Tensor,  # [M], log of the sum of exp(logit) over the whole vocabulary
    scale: Tensor,  # [M], the loss's gradient; 0 for rows that do not count
    vocab_start_index: int,
    smoothing: float,
    num_classes: int,
) -> Tensor:
    """Return the logits' gradient, [M, N].

    It is (softmax - smoothing / num_classes - (1 - smoothing) * onehot(target)) * scale.
    """
    out = logits.new_empty(logits.shape)
    rows = as_rows(logits)
    _launch_grad(rows, target, log_norm, scale, out, vocab_start_index, smoothing, num_classes)
    return out


def vocab_ce_grad_(
    logits: Tensor,
    target: Tensor,
    log_norm: Tensor,
    scale: Tensor,
    vocab_start_index: int,
    smoothing: float,
    num_classes: int,
) -> None:
    """Compute `vocab_ce_grad` in place of the logits."""
    rows = as_rows(logits)
    _launch_grad(rows, target, log_norm, scale, rows, vocab_start_index, smoothing, num_classes)
    if rows is not logits:  # no unit stride along the vocabulary: the gradient is in a copy
        logits.copy_(rows)


OPS = {f.__name__: f for f in (vocab_ce_stats, vocab_ce_grad, vocab_ce_grad_)}
