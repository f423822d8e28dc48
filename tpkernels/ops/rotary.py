"""Rotary position embedding of a rank's own heads."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_floating_point
from .fake import register_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels


@register_fake("rotary")
def _(input, cos, sin, interleaved, inverse):
    return torch.empty_like(input)


class _Rotary(torch.autograd.Function):
    """Rotate pairs of features by an angle a position; backward rotates back."""

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
    positions: int,
    features: int,
    theta: float = 10000.0,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * theta^(-2 i / features).

    Source: RoFormer (Su et al. 2021), equation 15.

    Args:
        positions: number of tokens.
        features: rotated features of a head, an even number.
        theta: base of the frequencies.
        device: of the result.
        dtype: of the result; None: float32.

    Returns:
        cos and sin, [positions, features / 2] each.

    Raises:
        ValueError: an odd number of features.

    Example:
        >>> cos, sin = rotary_tables(positions=16, features=8)
        >>> cos.shape
        torch.Size([16, 4])
    """
    if features % 2:
        raise ValueError(f"features must be even, pairs are rotated, got {features}")
    exponent = torch.arange(0, features, 2, device=device, dtype=torch.float32) / features
    angle = torch.outer(
        torch.arange(positions, device=device, dtype=torch.float32), theta**-exponent
    )
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotary(input: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate pairs of features: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    Heads are independent: a rank passes its own, and the cos and sin of the full model.

    Args:
        input: [batch, heads, tokens, head_dim], any strides.
        cos: [tokens, R / 2] or [batch, tokens, R / 2] with R <= head_dim. Features from R on stay
            as they are. cos and sin are constants: they get no gradient.
        sin: as cos.
        interleaved: pairs are (2i, 2i + 1), as in GPT-J; otherwise (i, i + R / 2), as in Llama and
            GPT-NeoX.

    Returns:
        [batch, heads, tokens, head_dim].

    Raises:
        TypeError: input is not floating point.
        ValueError: cos and sin that do not fit or that require grad.

    Example:
        >>> cos, sin = rotary_tables(positions=16, features=8)
        >>> rotary(torch.randn(2, 3, 16, 8), cos, sin).shape
        torch.Size([2, 3, 16, 8])
    """
    check_floating_point("input", input)
    if input.dim() != 4:
        raise ValueError(
            f"input must be [batch, heads, tokens, head_dim], got {tuple(input.shape)}"
        )
    batch, _, tokens, head_dim = input.shape
    is_shaped = cos.dim() in (2, 3) and cos.shape[:-1] in ((tokens,), (batch, tokens))
    if cos.shape != sin.shape or not is_shaped:
        raise ValueError(
            f"cos and sin must be [{tokens}, R / 2] or [{batch}, {tokens}, R / 2], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[-1] > head_dim:
        raise ValueError(
            f"cos has {cos.shape[-1]} pairs of features, "
            f"but head_dim {head_dim} has {head_dim // 2}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin get no gradient here: detach them")
    return _Rotary.apply(input, cos, sin, interleaved)
