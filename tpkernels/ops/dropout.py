"""Dropout whose mask is a function of a seed and of an element's place in the full tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_rows
from .fake import register_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels


@register_fake("dropout")
def _(input, seed, p, row, column):
    return input.new_empty(input.shape)


class _Dropout(torch.autograd.Function):
    """y = x * kept / (1 - p), dx = dy * kept / (1 - p).

    Backward draws the mask again: nothing but the seed is kept.
    """

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


def dropout(
    input: Tensor, p: float = 0.5, seed: Tensor | None = None, *, row: int = 0, column: int = 0
) -> Tensor:
    """Zero elements with probability p and divide the others by 1 - p.

    Whether the element at row r (of the flattened leading dimensions) and column c is kept depends
    on the seed, r and c alone. Ranks that hold parts of a tensor and pass where their part begins
    get the mask of the full tensor, at any TP size.

    Random numbers are Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy
    as 1, 2, 3", SC 2011): key = seed, counter = (c // 4, r), lane c % 4.

    Args:
        input: [..., N].
        p: in [0, 1].
        seed: int64 [1] on input's device, the same on every rank. None draws one from the default
            generator, which ranks keep in step outside TP regions.
        row: first row of input in the full tensor.
        column: first column of input in the full tensor.

    Returns:
        [..., N].

    Raises:
        TypeError: input is not floating point.
        ValueError: p outside [0, 1], negative offsets, a seed of another kind.

    Example:
        >>> dropout(torch.ones(4), p=0.0)
        tensor([1., 1., 1., 1.])
    """
    check_rows(input)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if row < 0 or column < 0:
        raise ValueError(f"row and column must not be negative, got {row} and {column}")
    if seed is None:
        seed = torch.randint(2**63 - 1, (1,), device=input.device)  # the host never reads it
    elif seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != input.device:
        raise ValueError(
            f"seed must be an int64 tensor of one element on {input.device}, "
            f"got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
        )
    return _Dropout.apply(input, seed, p, row, column)
