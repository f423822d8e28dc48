"""The column-parallel GEMM with bias and activation in its epilogue."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .activation import GATED, act
from .common import as_rows, on_device
from .launch_config import Tunable, cdiv


@triton.jit
def _gemm_tile(
    a_ptr,
    w_ptr,
    row,
    col,
    M,
    N,
    K,
    a_stride,
    w_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a_ptr[row] @ w_ptr[col]^T in float32."""
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + row[:, None].to(tl.int64) * a_stride + k[None, :]
    w_tile = w_ptr + col[None, :].to(tl.int64) * w_stride + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        left = tl.load(a_tile, (row < M)[:, None] & inside[None, :], other=0.0)
        right = tl.load(w_tile, inside[:, None] & (col < N)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_tile += BLOCK_K
        w_tile += BLOCK_K
    return total


@triton.jit
def _gated_gemm_tile(
    a_ptr,
    w_ptr,
    row,
    col,
    M,
    N,
    K,
    a_stride,
    w_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a_ptr[row] @ w_ptr[col]^T and a_ptr[row] @ w_ptr[N + col]^T in float32, a_ptr read once."""
    k = tl.arange(0, BLOCK_K)
    a_tile = a_ptr + row[:, None].to(tl.int64) * a_stride + k[None, :]
    w_tile = w_ptr + col[None, :].to(tl.int64) * w_stride + k[:, None]
    up_tile = w_tile + tl.cast(N, tl.int64) * w_stride
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        mask = inside[:, None] & (col < N)[None, :]
        left = tl.load(a_tile, (row < M)[:, None] & inside[None, :], other=0.0)
        gate = tl.dot(left, tl.load(w_tile, mask, other=0.0), gate, input_precision=PRECISION)
        up = tl.dot(left, tl.load(up_tile, mask, other=0.0), up, input_precision=PRECISION)
        a_tile += BLOCK_K
        w_tile += BLOCK_K
        up_tile += BLOCK_K
    return gate, up


@triton.jit
def column_linear_act_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    pre_ptr,
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
    """out_ptr [M, N] = act(a_ptr [M, K] @ w_ptr^T + bias_ptr), w_ptr [N, K], or [2 N, K] for [gate; up].

    pre_ptr: the product without bias_ptr, as wide as w_ptr is long. Tiles of GROUP_M M of tiles follow each other column by column, so that
    those in flight share their operands in L2.
    """
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP_M * across) * GROUP_M
    height = tl.minimum(down - first, GROUP_M)
    row = (first + pid % (GROUP_M * across) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = pid % (GROUP_M * across) // height * BLOCK_N + tl.arange(0, BLOCK_N)

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


def _sample(features, dtype, device, activation="gelu_tanh"):
    x, w = (
        torch.randn(4096, features, dtype=dtype, device=device),
        torch.randn(features, features, dtype=dtype, device=device),
    )
    return lambda: column_linear_act(x, w, None, activation, True)


PLAIN = Tunable("column_linear_act", heuristics.column_linear_tiles, _sample)
PACKED = Tunable(
    "column_linear_act_gated",
    heuristics.gated_column_linear_tiles,
    lambda *args: _sample(*args, activation="swiglu"),
)


def column_linear_act(
    input: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    gated = activation in GATED
    x, w = as_rows(input), as_rows(weight)
    M, K, features = x.shape[0], x.shape[1], w.shape[0]
    N = features // 2 if gated else features
    out = input.new_empty(*input.shape[:-1], N)
    pre = input.new_empty(*input.shape[:-1], features) if keep else input.new_empty(0)
    if M and N:
        config = (PACKED if gated else PLAIN)(N, x.element_size())
        blocks = config.blocks
        with on_device([x]):
            column_linear_act_kernel[(cdiv(M, blocks["BLOCK_M"]) * cdiv(N, blocks["BLOCK_N"]),)](
                x,
                w,
                bias,
                out,
                pre,
                M,
                N,
                K,
                x.stride(0),
                w.stride(0),
                ACT=GATED.get(activation, activation),
                GATED=gated,
                BIAS=bias is not None,
                KEEP=keep,
                PRECISION="ieee" if x.element_size() > 2 else "tf32",
                **config.options(),
            )
    return out, pre


OPS = {"column_linear_act": column_linear_act}
