"""Bias and activation of a column-parallel layer, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_features, check_rows
from .fake import register_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels

ACTIVATIONS = ("relu", "relu2", "gelu", "gelu_tanh", "silu")
GATED = ("swiglu", "geglu")  # silu(gate) * up, gelu(gate) * up


def check_activation(activation: str | None) -> None:
    """Raise ValueError unless `activation` is None or a known name."""
    known = [*ACTIVATIONS, *GATED]
    if activation is not None and activation not in known:
        raise ValueError(
            f"activation must be None or one of {', '.join(known)}, got {activation!r}"
        )


@register_fake("bias_act")
def _(input, bias, activation):
    n = input.shape[-1]
    return input.new_empty(*input.shape[:-1], n // 2 if activation in GATED else n)


@register_fake("bias_act_backward")
def _(grad, input, bias, activation, bias_grad):
    grads = [input.new_empty(input.shape)]
    if bias_grad:
        grads.append((input if bias is None else bias).new_empty(input.shape[-1]))
    return grads


@register_fake("gated_act")
def _(gate, up, gate_bias, up_bias, activation):
    return gate.new_empty(gate.shape)


@register_fake("gated_act_backward")
def _(grad, gate, up, gate_bias, up_bias, activation, bias_grad):
    grads = [gate.new_empty(gate.shape), up.new_empty(up.shape)]
    if bias_grad:
        for half, bias in ((gate, gate_bias), (up, up_bias)):
            grads.append((half if bias is None else bias).new_empty(gate.shape[-1]))
    return grads


class _BiasAct(torch.autograd.Function):
    """y = act(x + b), from [gate; up] of x for the gated activations.

    x   [..., N]   b [N]        y [..., N], or [..., N / 2] where gated
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
        need_b = ctx.needs_input_grad[1]
        grads = _ops.bias_act_backward(dy, x, bias, ctx.activation, need_b)
        return grads[0], grads[1] if need_b else None, None


class _GatedAct(torch.autograd.Function):
    """y = act(gate + b) * (up + c), all of [..., H], b and c [H]; backward as `_BiasAct`'s."""

    @staticmethod
    def forward(ctx, gate, up, gate_bias, up_bias, activation):
        ctx.save_for_backward(gate, up, gate_bias, up_bias)
        ctx.activation = activation
        return _ops.gated_act(gate, up, gate_bias, up_bias, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs = ctx.needs_input_grad[:4]
        bias_grad = any(needs[2:])
        grads = _ops.gated_act_backward(dy, *ctx.saved_tensors, ctx.activation, bias_grad)
        grads = [*grads, *[None] * (4 - len(grads))]
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def _promoted(input: Tensor, bias: Tensor | None, name: str) -> tuple[Tensor, Tensor | None]:
    """Return both in the dtype of input + bias; raise where they cannot be added by feature."""
    check_rows(input)
    check_features(name, bias, input)
    if bias is None:
        return input, None
    dtype = torch.promote_types(input.dtype, bias.dtype)
    return input.to(dtype), bias.to(dtype)


def bias_act(input: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Compute activation(input + bias) in one pass.

    Backward recomputes it, and sums the bias' gradient in the same pass.

    Args:
        input: [..., N]; [gate; up] for the gated activations.
        bias: [N] or None.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu".

    Returns:
        [..., N], or [..., N / 2] for the gated activations.

    Raises:
        TypeError: input is not floating point.
        ValueError: an unknown activation, a bias of another size, an odd N for a gated one.

    Example:
        >>> bias_act(torch.tensor([-2.0, 1.0]), torch.tensor([1.0, 1.0]), "relu")
        tensor([0., 2.])
    """
    check_activation(activation)
    x, bias = _promoted(input, bias, "bias")
    if activation is None:
        return x if bias is None else x + bias
    if activation in GATED and x.shape[-1] % 2:
        raise ValueError(
            f"{activation} takes [gate; up], two halves of one size, got {x.shape[-1]} features"
        )
    return _BiasAct.apply(x, bias, activation)


def gated_act(
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """Compute act(gate + gate_bias) * (up + up_bias) from separate halves; see `bias_act`.

    Args:
        gate: [..., H].
        up: [..., H].
        activation: "swiglu" or "geglu".
        gate_bias: [H]; both biases or neither.
        up_bias: [H].

    Returns:
        [..., H].

    Raises:
        TypeError: gate or up is not floating point.
        ValueError: another activation, halves of different shapes, a bias of another size, one
            bias without the other.

    Example:
        >>> gated_act(torch.zeros(2, 4), torch.ones(2, 4), "swiglu").shape
        torch.Size([2, 4])
    """
    if activation not in GATED:
        raise ValueError(f"activation must be one of {', '.join(GATED)}, got {activation!r}")
    if gate.shape != up.shape:
        raise ValueError(
            f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("gate_bias and up_bias: pass both or neither")
    gate, gate_bias = _promoted(gate, gate_bias, "gate_bias")
    up, up_bias = _promoted(up, up_bias, "up_bias")
    dtype = torch.promote_types(gate.dtype, up.dtype)
    return _GatedAct.apply(gate.to(dtype), up.to(dtype), gate_bias, up_bias, activation)
