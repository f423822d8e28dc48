"""Bias and activation of a column-parallel layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
GATED = {"swiglu": F.silu, "geglu": F.gelu}  # of [gate; up]: act(gate) * up


def check_activation(activation: str | None) -> None:
    """Raises ValueError unless `activation` is None or a known name."""
    known = [*ACTIVATIONS, *GATED]
    if activation is not None and activation not in known:
        raise ValueError(f"activation must be None or one of {', '.join(known)}, got {activation!r}")


def bias_act(input: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """activation(input + bias) over the last dimension.

    Args:
        input: [..., N]; for the gated ones [gate; up], and the result is [..., N / 2].
        bias: [N] or None.

    Raises:
        ValueError: an unknown activation, a bias of another size, an odd N for a gated one.
    """
    check_activation(activation)
    if bias is not None:
        if bias.shape != input.shape[-1:]:
            raise ValueError(f"bias has shape {tuple(bias.shape)} but input has {input.shape[-1]} features")
        input = input + bias
    if activation is None:
        return input
    if activation in GATED:
        if input.shape[-1] % 2:
            raise ValueError(f"{activation} takes [gate; up], two halves of one size, got {input.shape[-1]} features")
        gate, up = torch.chunk(input, 2, dim=-1)
        return GATED[activation](gate) * up
    return ACTIVATIONS[activation](input)
