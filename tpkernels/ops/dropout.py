"""Dropout whose mask is a function of a seed and of where an element stands in the unsplit tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .once import once_differentiable

_ops = torch.ops.tpkernels


@torch.library.register_fake("tpkernels::dropout")
def _(input, seed, p, row, column):
    return input.new_empty(input.shape)


class _Dropout(torch.autograd.Function):
    """y = x * kept / (1 - p); dx = dy * kept / (1 - p) with the mask drawn again: nothing but the seed is kept."""

    @staticmethod
    def forward(ctx, x, seed, p, row, column):
        ctx.save_for_backward(seed)
        ctx.options = p, row, column
        return _ops.dropout(x, seed, p, row, column)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return _ops.dropout(dy, seed, *ctx.options), None, None, None, None


def draw_seed(device: torch.device) -> Tensor:
    """A seed for `dropout` from the device's default generator: an int64 tensor of one element, never read by the host."""
    return torch.randint(2**63 - 1, (1,), device=device)


def dropout(
    input: Tensor, p: float = 0.5, seed: Tensor | None = None, *, row: int = 0, column: int = 0
) -> Tensor:
    """Zeroes elements with probability p and divides the others by 1 - p, as torch.nn.functional.dropout.

    Whether the element at row r (of the flattened leading dimensions) and column c is kept depends on the seed, r and c alone:
    ranks that hold parts of a tensor and pass where their part begins get the mask of the whole tensor, at any TP size.
    Random numbers: Philox4x32 with 7 rounds (Salmon et al., SC 2011), key = seed, counter = (c // 4, r), lane c % 4.

    Args:
        input: [..., N].
        p: in [0, 1].
        seed: int64 [1] on input's device, the same on every rank; None draws one from the default generator, which ranks keep in
            step outside split regions.
        row, column: where input begins in the unsplit tensor.

    Raises:
        TypeError, ValueError: input that is not floating point, p outside [0, 1], negative offsets, a seed of another kind.
    """
    if not input.is_floating_point():
        raise TypeError(f"input must be floating point, got {input.dtype}: cast it first")
    if input.dim() < 1:
        raise ValueError("input must have at least one dimension, [..., N]")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if row < 0 or column < 0:
        raise ValueError(f"row and column must not be negative, got {row} and {column}")
    if seed is None:
        seed = draw_seed(input.device)
    elif seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != input.device:
        raise ValueError(
            f"seed must be an int64 tensor of one element on {input.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    return _Dropout.apply(input, seed, p, row, column)
