"""Triton kernel of `column_linear_act`: a GEMM with bias and activation in its epilogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .activation import GATED, act
from .common import as_rows, as_vector, on_device
from .launch_config import Tunable, cdiv


@triton.jit
def _gemm_tile(
    a_ptr,  # [M, K]
    w_ptr,  # [N, K]
    row,  # [BLOCK_M]
    col,  # [BLOCK_N]
    M,
    N,
    K,
    a_stride,
    w_stride,
    PRECISION: tl.constexpr,  # of the products: "ieee" or "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a[row] @ w[col]^T in float32, [BLOCK_M, BLOCK_N]."""
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + row[:, None].to(tl.int64) * a_stride + k[None, :]
    w_tile = w_ptr + col[None, :].to(tl.int64) * w_stride + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        a = tl.load(a_tile, (row < M)[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_tile, inside[:, None] & (col < N)[None, :], other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
        a_tile += BLOCK_K
        w_tile += BLOCK_K
    return total


@triton.jit
def _gated_gemm_tile(
    a_ptr,  # [M, K]
    w_ptr,  # [2 N, K], [gate; up]
    row,  # [BLOCK_M]
    col,  # [BLOCK_N]
    M,
    N,
    K,
    a_stride,
    w_stride,
    PRECISION: tl.constexpr,  # of the products: "ieee" or "tf32"
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return a[row] @ w[col]^T and a[row] @ w[N + col]^T in float32; `a` is read once."""
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + row[:, None].to(tl.int64) * a_stride + k[None, :]
    w_tile = w_ptr + col[None, :].to(tl.int64) * w_stride + k[:, None]
    up_tile = w_tile + tl.cast(N, tl.int64) * w_stride
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        mask = inside[:, None] & (col < N)[None, :]
        a = tl.load(a_tile, (row < M)[:, None] & inside[None, :], other=0.0)
        gate = tl.dot(a, tl.load(w_tile, mask, other=0.0), gate, input_precision=PRECISION)
        up = tl.dot(a, tl.load(up_tile, mask, other=0.0), up, input_precision=PRECISION)
        a_tile += BLOCK_K
        w_tile += BLOCK_K
        up_tile += BLOCK_K
    return gate, up


@triton.jit
def column_linear_act_kernel(
    a_ptr,  # [M, K]
    w_ptr,  # [N, K], or [2 N, K] for [gate; up]
    bias_ptr,  # [N] or [2 N]
    out_ptr,  # [M, N]
    pre_ptr,  # [M, N] or [M, 2 N]: the product without bias, if KEEP
    M,
    N,
    K,
    a_stride,
    w_stride,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute out = act(a @ w^T + bias), or act(gate) * up.

    Programs walk column by column through groups of GROUP_M rows of tiles, so that those in
    flight share their operands in L2 (grouped ordering of Triton's matrix multiplication
    tutorial).
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first_tile = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_tile, GROUP_M)
    row = (first_tile + pid % (GROUP_M * tiles_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = pid % (GROUP_M * tiles_n) // height * BLOCK_N + tl.arange(0, BLOCK_N)

    mask = (row < M)[:, None] & (col < N)[None, :]
    at = row[:, None].to(tl.int64) * N + col[None, :]
    if GATED:
        gate, up = _gated_gemm_tile(
            a_ptr,
            w_ptr,
            row,
            col,
            M,
            N,
            K,
            a_stride,
            w_stride,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if KEEP:
            packed = row[:, None].to(tl.int64) * (2 * N) + col[None, :]
            tl.store(pre_ptr + packed, gate.to(pre_ptr.dtype.element_ty), mask)
            tl.store(pre_ptr + packed + N, up.to(pre_ptr.dtype.element_ty), mask)
        if BIAS:
            gate += tl.load(bias_ptr + col, col < N, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_ptr + N + col, col < N, other=0.0).to(tl.float32)[None, :]
        y = act(gate, ACT) * up
    else:
        x = _gemm_tile(
            a_ptr,
            w_ptr,
            row,
            col,
            M,
            N,
            K,
            a_stride,
            w_stride,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if KEEP:
            tl.store(pre_ptr + at, x.to(pre_ptr.dtype.element_ty), mask)
        if BIAS:
            x += tl.load(bias_ptr + col, col < N, other=0.0).to(tl.float32)[None, :]
        y = act(x, ACT)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask)


def _sample(
    features: int, dtype: torch.dtype, device: torch.device, activation: str = "gelu_tanh"
) -> Callable[[], object]:
    x = torch.randn(4096, features, dtype=dtype, device=device)
    w = torch.randn(features, features, dtype=dtype, device=device)
    return lambda: column_linear_act(x, w, None, activation, True)


PLAIN = Tunable("column_linear_act", heuristics.column_linear_tiles, _sample)
PACKED = Tunable(
    "column_linear_act_gated",
    heuristics.gated_column_linear_tiles,
    lambda *args: _sample(*args, activation="swiglu"),
)


def column_linear_act(
    input: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], or [2 N, K] for [gate; up]
    bias: Tensor | None,  # [N] or [2 N]
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return act(input @ weight^T + bias) [..., N] and, if `keep`, the product without bias.

    The second tensor is [..., N], or [..., 2 N] for a gated activation; it is [0] unless `keep`.
    """
    gated = activation in GATED
    x, w = as_rows(input), as_rows(weight)
    M, K = x.shape
    N = w.shape[0] // 2 if gated else w.shape[0]
    out = input.new_empty(*input.shape[:-1], N)
    pre = input.new_empty(*input.shape[:-1], w.shape[0]) if keep else input.new_empty(0)
    if not M or not N:
        return out, pre
    config = (PACKED if gated else PLAIN)(N, x.element_size())
    grid = (cdiv(M, config.blocks["BLOCK_M"]) * cdiv(N, config.blocks["BLOCK_N"]),)
    with on_device([x]):
        column_linear_act_kernel[grid](
            x,
            w,
            as_vector(bias),
            out,
            pre,
            M,
            N,
            K,
            x.stride(0),
            w.stride(0),
            **config.options(
                ACT=GATED.get(activation, activation),
                GATED=gated,
                BIAS=bias is not None,
                KEEP=keep,
                PRECISION="ieee" if x.element_size() > 2 else "tf32",
            ),
        )
    return out, pre


OPS = {"column_linear_act": column_linear_act}
