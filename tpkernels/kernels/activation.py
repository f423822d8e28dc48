"""Bias and activation in one pass, forward and backward; gated ones from two halves, wherever these lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import as_rows, on_device, opmath_dtype, sum_partials, tl_opmath_dtype
from .launch_config import Tunable, cdiv


@triton.jit
def act(x, ACT: tl.constexpr):
    """act(x) for float32 or float64 x."""
    if ACT == "relu":
        return tl.where(x <= 0, 0, x)  # NaN stays NaN, as torch's
    elif ACT == "relu2":
        r = tl.where(x <= 0, 0, x)
        return r * r
    elif ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACT == "gelu")
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def act_and_grad(x, ACT: tl.constexpr):
    """act(x) and its derivative; what is not used is not computed."""
    if ACT == "relu":
        return tl.where(x <= 0, 0, x), tl.where(x <= 0, 0, 1).to(x.dtype)
    elif ACT == "relu2":
        r = tl.where(x <= 0, 0, x)
        return r * r, 2 * r
    elif ACT == "silu":
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return x * s, s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        tl.static_assert(ACT == "gelu")
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def bias_act_kernel(
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    out_ptr,
    M,
    N,
    gate_stride,
    up_stride,
    out_stride,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < M) & (col < N)
    x = tl.load(gate_ptr + row * gate_stride + col, mask, other=0.0).to(OPMATH)
    if BIAS:
        x += tl.load(gate_bias_ptr + col, col < N, other=0.0).to(OPMATH)
    y = act(x, ACT)
    if GATED:
        u = tl.load(up_ptr + row * up_stride + col, mask, other=0.0).to(OPMATH)
        if BIAS:
            u += tl.load(up_bias_ptr + col, col < N, other=0.0).to(OPMATH)
        y *= u
    tl.store(out_ptr + row * out_stride + col, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def bias_act_backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    d_gate_ptr,
    d_up_ptr,
    partial_sums_ptr,
    M,
    N,
    num_splits,
    grad_stride,
    gate_stride,
    up_stride,
    d_gate_stride,
    d_up_stride,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BIAS_GRAD: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One strip of columns and every num_splits-th tile of rows: the strip's share of the bias gradient stays in registers.

    partial_sums_ptr [num_splits, 1, N], or [num_splits, 2, N] for gated ones: what `sum_partials` adds up_ptr. No atomics: their order would vary.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles
    col = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = col < N
    if BIAS:
        b = tl.load(gate_bias_ptr + col, inside, other=0.0).to(OPMATH)
        if GATED:
            c = tl.load(up_bias_ptr + col, inside, other=0.0).to(OPMATH)
    gate_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    up_sum = tl.zeros((BLOCK_M, BLOCK_N), OPMATH)
    for tile in range(split, tl.cdiv(M, BLOCK_M), num_splits):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        mask = (row < M) & inside
        dy = tl.load(grad_ptr + row * grad_stride + col, mask, other=0.0).to(OPMATH)
        x = tl.load(gate_ptr + row * gate_stride + col, mask, other=0.0).to(OPMATH)
        if BIAS:
            x += b
        y, slope = act_and_grad(x, ACT)
        if GATED:
            u = tl.load(up_ptr + row * up_stride + col, mask, other=0.0).to(OPMATH)
            if BIAS:
                u += c
            du = dy * y
            dy *= u
            tl.store(d_up_ptr + row * d_up_stride + col, du.to(d_up_ptr.dtype.element_ty), mask)
            if BIAS_GRAD:
                up_sum += du
        dx = dy * slope
        tl.store(d_gate_ptr + row * d_gate_stride + col, dx.to(d_gate_ptr.dtype.element_ty), mask)
        if BIAS_GRAD:
            gate_sum += dx
    if BIAS_GRAD:
        column = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        width = N * 2 if GATED else N
        tl.store(partial_sums_ptr + split * width + column, tl.sum(gate_sum, 0), column < N)
        if GATED:
            tl.store(partial_sums_ptr + split * width + N + column, tl.sum(up_sum, 0), column < N)


def _sample(features, dtype, device):
    x, b = (
        torch.randn(4096, features, dtype=dtype, device=device),
        torch.randn(features, dtype=dtype, device=device),
    )
    return lambda: bias_act(x, b, "gelu_tanh")


def _sample_backward(features, dtype, device, activation="gelu_tanh"):
    x = torch.randn(4096, features * (2 if activation in GATED else 1), dtype=dtype, device=device)
    grad, bias = torch.randn(4096, features, dtype=dtype, device=device), x[0].clone()
    return lambda: bias_act_backward(grad, x, bias, activation, True)


FORWARD = Tunable("bias_act", heuristics.activation_tiles, _sample)
BACKWARD = Tunable("bias_act_backward", heuristics.activation_tiles, _sample_backward)
GATED_BACKWARD = Tunable(
    "gated_act_backward",
    heuristics.gated_act_backward_tiles,
    lambda *args: _sample_backward(*args, activation="swiglu"),
)
GATED = {"swiglu": "silu", "geglu": "gelu"}


def _launch(gate, up, gate_bias, up_bias, out, activation) -> None:
    M, N = gate.shape
    if not gate.numel():
        return
    config = FORWARD(N, gate.element_size())
    grid = (cdiv(M, config.blocks["BLOCK_M"]) * cdiv(N, config.blocks["BLOCK_N"]),)
    with on_device([gate]):
        bias_act_kernel[grid](
            gate,
            up,
            gate_bias,
            up_bias,
            out,
            M,
            N,
            gate.stride(0),
            up.stride(0) if up is not None else 0,
            out.stride(0),
            ACT=GATED.get(activation, activation),
            GATED=up is not None,
            BIAS=gate_bias is not None,
            OPMATH=tl_opmath_dtype(gate.dtype),
            **config.options(),
        )


def _launch_backward(
    grad, gate, up, gate_bias, up_bias, d_gate, d_up, activation, bias_grad
) -> Tensor | None:
    """Fills d_gate and d_up; with `bias_grad` returns the bias gradient's partial_sums sums, [num_splits, 1 (2 for gated ones), N]."""
    M, N = gate.shape
    pairs = 2 if up is not None else 1
    if not gate.numel():
        return gate.new_zeros(1, pairs, N, dtype=opmath_dtype(gate.dtype)) if bias_grad else None
    config = (BACKWARD if up is None else GATED_BACKWARD)(N, gate.element_size())
    columns = cdiv(N, config.blocks["BLOCK_N"])
    num_splits = heuristics.bias_grad_splits(M, config.blocks["BLOCK_M"], columns)
    partial_sums = (
        gate.new_empty(num_splits, pairs, N, dtype=opmath_dtype(gate.dtype)) if bias_grad else None
    )
    with on_device([gate]):
        bias_act_backward_kernel[(num_splits * columns,)](
            grad,
            gate,
            up,
            gate_bias,
            up_bias,
            d_gate,
            d_up,
            partial_sums,
            M,
            N,
            num_splits,
            grad.stride(0),
            gate.stride(0),
            up.stride(0) if up is not None else 0,
            d_gate.stride(0),
            d_up.stride(0) if up is not None else 0,
            ACT=GATED.get(activation, activation),
            GATED=up is not None,
            BIAS=gate_bias is not None,
            BIAS_GRAD=bias_grad,
            OPMATH=tl_opmath_dtype(gate.dtype),
            **config.options(),
        )
    return partial_sums


def _bias_dtype(input: Tensor, bias: Tensor | None) -> torch.dtype:
    return input.dtype if bias is None else bias.dtype


def _chunk_pair(packed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return packed.chunk(2, -1) if packed is not None else (None, None)


def bias_act(input: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    x = as_rows(input)
    gate, up = x.chunk(2, -1) if activation in GATED else (x, None)
    gate_bias, up_bias = _chunk_pair(bias) if up is not None else (bias, None)
    out = input.new_empty(*input.shape[:-1], gate.shape[-1])
    _launch(gate, up, gate_bias, up_bias, as_rows(out), activation)
    return out


def bias_act_backward(
    grad: Tensor, input: Tensor, bias: Tensor | None, activation: str, bias_grad: bool
) -> list[Tensor]:
    x, dx = as_rows(input), input.new_empty(input.shape)
    flat = as_rows(dx)
    if activation in GATED:
        (gate, up), (d_gate, d_up), (gate_bias, up_bias) = (
            _chunk_pair(x),
            _chunk_pair(flat),
            _chunk_pair(bias),
        )
    else:
        gate, up, d_gate, d_up, gate_bias, up_bias = x, None, flat, None, bias, None
    partial_sums = _launch_backward(
        as_rows(grad), gate, up, gate_bias, up_bias, d_gate, d_up, activation, bias_grad
    )
    return (
        [dx]
        if partial_sums is None
        else [dx, *sum_partials(partial_sums.flatten(1).unsqueeze(1), _bias_dtype(input, bias))]
    )


def gated_act(
    gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    out = gate.new_empty(gate.shape)
    _launch(as_rows(gate), as_rows(up), gate_bias, up_bias, as_rows(out), activation)
    return out


def gated_act_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    bias_grad: bool,
) -> list[Tensor]:
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    partial_sums = _launch_backward(
        as_rows(grad),
        as_rows(gate),
        as_rows(up),
        gate_bias,
        up_bias,
        as_rows(d_gate),
        as_rows(d_up),
        activation,
        bias_grad,
    )
    return (
        [d_gate, d_up]
        if partial_sums is None
        else [d_gate, d_up, *sum_partials(partial_sums, _bias_dtype(gate, gate_bias))]
    )


OPS = {f.__name__: f for f in (bias_act, bias_act_backward, gated_act, gated_act_backward)}
