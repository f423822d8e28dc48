"""Triton kernels of bias and activation in one pass, forward and backward.

Gated activations (SwiGLU, GEGLU) read gate and up from one packed tensor or from two tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import heuristics
from .common import as_rows, as_vector, on_device, opmath_dtype, sum_partials, tl_opmath_dtype
from .launch_config import Tunable, cdiv


@triton.jit
def act(x, ACT: tl.constexpr):
    """Return the activation of a float32 or float64 x."""
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
    """Return act(x) and its derivative; the compiler drops a result that is not used."""
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
    gate_ptr,  # [M, N]
    up_ptr,  # [M, N], or None unless GATED
    gate_bias_ptr,  # [N]
    up_bias_ptr,  # [N]
    out_ptr,  # [M, N]
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
    """Compute out = act(gate + gate_bias), times (up + up_bias) if GATED; a tile a program."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
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
    grad_ptr,  # [M, N]
    gate_ptr,  # [M, N]
    up_ptr,  # [M, N], or None unless GATED
    gate_bias_ptr,  # [N]
    up_bias_ptr,  # [N]
    d_gate_ptr,  # [M, N]
    d_up_ptr,  # [M, N], or None unless GATED
    partial_sums_ptr,  # [num_splits, 1 (2 if GATED), N], for `sum_partials`
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
    """Compute d_gate = grad * up * act'(gate) and d_up = grad * act(gate), biases added.

    A program takes one strip of columns and every num_splits-th tile of rows. Its share of the
    bias gradient stays in registers. There are no atomics, because their order would vary.
    """
    tiles_n = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // tiles_n
    col = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
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
        column = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        width = N * 2 if GATED else N
        tl.store(partial_sums_ptr + split * width + column, tl.sum(gate_sum, 0), column < N)
        if GATED:
            tl.store(partial_sums_ptr + split * width + N + column, tl.sum(up_sum, 0), column < N)


def _sample(features: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    x = torch.randn(4096, features, dtype=dtype, device=device)
    bias = torch.randn(features, dtype=dtype, device=device)
    return lambda: bias_act(x, bias, "gelu_tanh")


def _sample_backward(
    features: int, dtype: torch.dtype, device: torch.device, activation: str = "gelu_tanh"
) -> Callable[[], object]:
    x = torch.randn(4096, features * (2 if activation in GATED else 1), dtype=dtype, device=device)
    grad = torch.randn(4096, features, dtype=dtype, device=device)
    bias = x[0].clone()
    return lambda: bias_act_backward(grad, x, bias, activation, True)


FORWARD = Tunable("bias_act", heuristics.activation_tiles, _sample)
BACKWARD = Tunable("bias_act_backward", heuristics.activation_tiles, _sample_backward)
GATED_BACKWARD = Tunable(
    "gated_act_backward",
    heuristics.gated_act_backward_tiles,
    lambda *args: _sample_backward(*args, activation="swiglu"),
)
GATED = {"swiglu": "silu", "geglu": "gelu"}  # gated activation -> the gate's


class _Input(NamedTuple):
    """The activation's input; `up` and `up_bias` are None unless it is gated."""

    gate: Tensor  # [M, N]
    up: Tensor | None  # [M, N]
    gate_bias: Tensor | None  # [N]
    up_bias: Tensor | None  # [N]


def _unpack(input: Tensor, bias: Tensor | None, activation: str) -> _Input:
    """Cut [..., 2 N] of a gated activation, and its bias [2 N], into gate and up."""
    x = as_rows(input)
    if activation not in GATED:
        return _Input(x, None, bias, None)
    return _Input(*x.chunk(2, -1), *((None, None) if bias is None else bias.chunk(2, -1)))


def _launch(input: _Input, out: Tensor, activation: str) -> None:
    """Fill `out` [M, N]."""
    gate, up, gate_bias, up_bias = input
    M, N = gate.shape
    if not gate.numel():
        return
    config = FORWARD(N, gate.element_size())
    grid = (cdiv(M, config.blocks["BLOCK_M"]) * cdiv(N, config.blocks["BLOCK_N"]),)
    with on_device([gate]):
        bias_act_kernel[grid](
            gate,
            up,
            as_vector(gate_bias),
            as_vector(up_bias),
            out,
            M,
            N,
            gate.stride(0),
            0 if up is None else up.stride(0),
            out.stride(0),
            **config.options(
                ACT=GATED.get(activation, activation),
                GATED=up is not None,
                BIAS=gate_bias is not None,
                OPMATH=tl_opmath_dtype(gate.dtype),
            ),
        )


def _launch_backward(
    grad: Tensor,  # [M, N]
    input: _Input,
    d_gate: Tensor,  # [M, N]
    d_up: Tensor | None,  # [M, N]
    activation: str,
    bias_grad: bool,
) -> Tensor | None:
    """Fill d_gate and d_up.

    Returns:
        With `bias_grad` the bias gradient's partial sums, [num_splits, 1 (2 if gated), N].
    """
    gate, up, gate_bias, up_bias = input
    M, N = gate.shape
    biases, opmath = 1 if up is None else 2, opmath_dtype(gate.dtype)
    if not gate.numel():
        return gate.new_zeros(1, biases, N, dtype=opmath) if bias_grad else None
    config = (BACKWARD if up is None else GATED_BACKWARD)(N, gate.element_size())
    tiles_n = cdiv(N, config.blocks["BLOCK_N"])
    num_splits = heuristics.bias_grad_splits(M, config.blocks["BLOCK_M"], tiles_n)
    partial_sums = gate.new_empty(num_splits, biases, N, dtype=opmath) if bias_grad else None
    with on_device([gate]):
        bias_act_backward_kernel[(num_splits * tiles_n,)](
            grad,
            gate,
            up,
            as_vector(gate_bias),
            as_vector(up_bias),
            d_gate,
            d_up,
            partial_sums,
            M,
            N,
            num_splits,
            grad.stride(0),
            gate.stride(0),
            0 if up is None else up.stride(0),
            d_gate.stride(0),
            0 if d_up is None else d_up.stride(0),
            **config.options(
                ACT=GATED.get(activation, activation),
                GATED=up is not None,
                BIAS=gate_bias is not None,
                BIAS_GRAD=bias_grad,
                OPMATH=tl_opmath_dtype(gate.dtype),
            ),
        )
    return partial_sums


def bias_act(
    input: Tensor,  # [..., N], or [..., 2 N] for [gate, up]
    bias: Tensor | None,  # [N] or [2 N]
    activation: str,
) -> Tensor:
    """Return act(input + bias), or act(gate) * up, [..., N]."""
    unpacked = _unpack(input, bias, activation)
    out = input.new_empty(*input.shape[:-1], unpacked.gate.shape[-1])
    _launch(unpacked, as_rows(out), activation)
    return out


def bias_act_backward(
    grad: Tensor,  # [..., N]
    input: Tensor,  # [..., N], or [..., 2 N] for [gate, up]
    bias: Tensor | None,  # [N] or [2 N]
    activation: str,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of `input` and, with `bias_grad`, of `bias`."""
    dx = input.new_empty(input.shape)
    d_gate, d_up, _, _ = _unpack(dx, None, activation)
    unpacked = _unpack(input, bias, activation)
    partial_sums = _launch_backward(as_rows(grad), unpacked, d_gate, d_up, activation, bias_grad)
    if partial_sums is None:
        return [dx]
    # One bias [2 N]: its halves are one sum.
    return [dx, *sum_partials(partial_sums.flatten(1).unsqueeze(1), _dtype(bias, input))]


def gated_act(
    gate: Tensor,  # [..., N]
    up: Tensor,  # [..., N]
    gate_bias: Tensor | None,  # [N]
    up_bias: Tensor | None,  # [N]
    activation: str,
) -> Tensor:
    """Return act(gate + gate_bias) * (up + up_bias), [..., N]."""
    out = gate.new_empty(gate.shape)
    _launch(_Input(as_rows(gate), as_rows(up), gate_bias, up_bias), as_rows(out), activation)
    return out


def gated_act_backward(
    grad: Tensor,  # [..., N]
    gate: Tensor,  # [..., N]
    up: Tensor,  # [..., N]
    gate_bias: Tensor | None,  # [N]
    up_bias: Tensor | None,  # [N]
    activation: str,
    bias_grad: bool,
) -> list[Tensor]:
    """Return the gradients of gate and up and, with `bias_grad`, of their biases."""
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    input = _Input(as_rows(gate), as_rows(up), gate_bias, up_bias)
    partial_sums = _launch_backward(
        as_rows(grad), input, as_rows(d_gate), as_rows(d_up), activation, bias_grad
    )
    if partial_sums is None:
        return [d_gate, d_up]
    return [d_gate, d_up, *sum_partials(partial_sums, _dtype(gate_bias, gate))]


def _dtype(bias: Tensor | None, input: Tensor) -> torch.dtype:
    return input.dtype if bias is None else bias.dtype


OPS = {f.__name__: f for f in (bias_act, bias_act_backward, gated_act, gated_act_backward)}
