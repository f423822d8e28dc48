"""Bias and activation of a column-parallel layer, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .once import once_differentiable

_ops = torch.ops.tpkernels

ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu")
GATED = ("swiglu", "geglu")  # of a gate and an up half: silu(gate) * up, gelu(gate) * up


def check_activation(activation: str | None) -> None:
    """Raises ValueError unless `activation` is None or a known name."""
    known = [*ACTIVATIONS, *GATED]
    if activation is not None and activation not in known:
        raise ValueError(
            f"activation must be None or one of {', '.join(known)}, got {activation!r}"
        )


@torch.library.register_fake("tpkernels::bias_act")
def _(input, bias, activation):
    return input.new_empty(
        *input.shape[:-1], input.shape[-1] // 2 if activation in GATED else input.shape[-1]
    )


@torch.library.register_fake("tpkernels::bias_act_backward")
def _(grad, input, bias, activation, bias_grad):
    d_bias = [(bias if bias is not None else input).new_empty(input.shape[-1])] if bias_grad else []
    return [input.new_empty(input.shape), *d_bias]


@torch.library.register_fake("tpkernels::gated_act")
def _(gate, up, gate_bias, up_bias, activation):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("tpkernels::gated_act_backward")
def _(grad, gate, up, gate_bias, up_bias, activation, bias_grad):
    halves = [gate.new_empty(gate.shape), up.new_empty(up.shape)]
    return halves + [
        (gate_bias if gate_bias is not None else gate).new_empty(gate.shape[-1])
        for _ in halves
        if bias_grad
    ]


class _BiasAct(torch.autograd.Function):
    """x [..., N], b [N] -> y = act(x + b) [..., N], or [..., N / 2] of the halves [gate; up].

    dx  = dy * act'(x + b)      recomputed: only x and b are kept
    db  = sum of dx over rows   in the same pass, in two stages without atomics
    """

    @staticmethod
    def forward(ctx, x, bias, activation):
        ctx.save_for_backward(x, bias)
        ctx.activation = activation
        return _ops.bias_act(x, bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, bias = ctx.saved_tensors
        grads = _ops.bias_act_backward(dy, x, bias, ctx.activation, ctx.needs_input_grad[1])
        return grads[0], grads[1] if ctx.needs_input_grad[1] else None, None


class _GatedAct(torch.autograd.Function):
    """gate, up [..., H], b, c [H] -> act(gate + b) * (up + c); backward as `_BiasAct`'s."""

    @staticmethod
    def forward(ctx, gate, up, gate_bias, up_bias, activation):
        ctx.save_for_backward(gate, up, gate_bias, up_bias)
        ctx.activation = activation
        return _ops.gated_act(gate, up, gate_bias, up_bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        bias_grad = any(ctx.needs_input_grad[2:4])
        grads = _ops.gated_act_backward(dy, *ctx.saved_tensors, ctx.activation, bias_grad)
        grads = [*grads, *[None] * (4 - len(grads))]
        return *(
            g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)
        ), None


def _same_dtype(input: Tensor, bias: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
    """Both in the dtype that input + bias has; raises where they cannot be added feature by feature."""
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}: cast it first")
    if input.dim() < 1:
        raise ValueError("input must have at least one dimension, [..., N]")
    if bias is None:
        return input, None
    if bias.shape != input.shape[-1:]:
        raise ValueError(
            f"{name} has shape {tuple(bias.shape)} but input has {input.shape[-1]} features"
        )
    dtype = torch.promote_types(input.dtype, bias.dtype)
    return input.to(dtype), bias.to(dtype)


def bias_act(input: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(input + bias) over the last dimension, in one pass; backward recomputes it and adds the bias' gradient up in one.

    Args:
        input: [..., N]; for the gated ones [gate; up], and the result is [..., N / 2].
        bias: [N] or None.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu".

    Raises:
        TypeError: input is not floating point.
        ValueError: an unknown activation, a bias of another size, an odd N for a gated one.
    """
    check_activation(activation)
    input, bias = _same_dtype(input, bias, "bias")
    if activation is None:
        return input if bias is None else input + bias
    if activation in GATED and input.shape[-1] % 2:
        raise ValueError(
            f"{activation} takes [gate; up], two halves of one size, got {input.shape[-1]} features"
        )
    return _BiasAct.apply(input, bias, activation)


def gated_act(
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """act(gate + gate_bias) * (up + up_bias) from separate halves, for "swiglu" and "geglu"; see `bias_act`.

    Args:
        gate, up: [..., H].
        gate_bias, up_bias: [H]; both or neither.

    Raises:
        TypeError: gate or up is not floating point.
        ValueError: another activation, halves of different shapes, a bias of another size, one bias without the other.
    """
    if activation not in GATED:
        raise ValueError(f"activation must be one of {', '.join(GATED)}, got {activation!r}")
    if gate.shape != up.shape:
        raise ValueError(
            f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("gate_bias and up_bias: pass both or neither")
    gate, gate_bias = _same_dtype(gate, gate_bias, "gate_bias")
    up, up_bias = _same_dtype(up, up_bias, "up_bias")
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return _GatedAct.apply(gate.to(dtype), up.to(dtype), gate_bias, up_bias, activation)
