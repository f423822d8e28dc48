"""Rotary position embedding of a rank's own heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .once import once_differentiable

_ops = torch.ops.tpkernels


@torch.library.register_fake("tpkernels::rotary")
def _(input, cos, sin, interleaved, inverse):
    return torch.empty_like(input)


class _Rotary(torch.autograd.Function):
    """Rotates pairs of features by an angle a position; backward rotates back."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _ops.rotary(x, cos, sin, interleaved, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _ops.rotary(dy, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


def rotary_tables(
    positions: int, features: int, theta: float = 10000.0, device=None, dtype=None
) -> tuple[Tensor, Tensor]:
    """cos and sin [positions, features / 2] of position * theta^(-2 i / features) (RoFormer, Su et al. 2021, equation 15)."""
    if features % 2:
        raise ValueError(f"features must be even, pairs are rotated, got {features}")
    frequency = theta ** (
        -torch.arange(0, features, 2, device=device, dtype=torch.float32) / features
    )
    angle = torch.outer(torch.arange(positions, device=device, dtype=torch.float32), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary(input: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary position embedding: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    Heads are independent, so a rank passes its own, and the tables of the whole model.

    Args:
        input: [batch, heads, tokens, head_dim], any strides.
        cos, sin: [tokens, R / 2] or [batch, tokens, R / 2] with R <= head_dim; features from R on are left as they are. Constants:
            they get no gradient.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J; otherwise (i, i + R / 2), as in Llama and GPT-NeoX.

    Raises:
        TypeError, ValueError: input that is not floating point, tables that do not fit or that require grad.
    """
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}: cast it first")
    if input.dim() != 4:
        raise ValueError(
            f"input must be [batch, heads, tokens, head_dim], got {tuple(input.shape)}"
        )
    batch, _, tokens, head_dim = input.shape
    if (
        cos.shape != sin.shape
        or cos.dim() not in (2, 3)
        or cos.shape[:-1] not in ((tokens,), (batch, tokens))
    ):
        raise ValueError(
            f"cos and sin must be [{tokens}, R / 2] or [{batch}, {tokens}, R / 2], got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[-1] > head_dim:
        raise ValueError(
            f"cos has {cos.shape[-1]} pairs of features, but head_dim {head_dim} has {head_dim // 2}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradient here: detach them")
    return _Rotary.apply(input, cos, sin, interleaved)
