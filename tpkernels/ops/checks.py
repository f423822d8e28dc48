"""Checks that several functionals make before any work."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def check_floating_point(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless `tensor` is floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}: cast it first")


def check_rows(input: Tensor) -> None:
    """Raise unless `input` is floating point and has the shape [..., N]."""
    check_floating_point("input", input)
    if input.dim() < 1:
        raise ValueError("input must have at least one dimension, [..., N]")


def check_features(name: str, tensor: Tensor | None, input: Tensor) -> None:
    """Raise ValueError unless `tensor` is None or [N], with N the features of input [..., N]."""
    if tensor is not None and tensor.shape != input.shape[-1:]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but input has {input.shape[-1]} features"
        )


def check_integers(name: str, values: Tensor) -> None:
    """Raise TypeError unless `values` are int32 or int64, as index_select and gather take them.

    A rank without rows does not come to those, so this is checked on every rank.
    """
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {values.dtype}")


def check_in_range(name: str, values: Tensor, size: int, what: str) -> None:
    """Raise IndexError unless all integer `values` are in [0, size).

    On a GPU the check is an assertion on the device, so that nothing is synchronised.
    """
    check_integers(name, values)
    if not values.numel():
        return
    if values.device.type == "cuda":
        is_inside = ((values >= 0) & (values < size)).all()
        torch.ops.aten._assert_async.msg(is_inside, f"{name} outside [0, {size}), {what}")
    elif values.device.type == "cpu" and not is_fake(values):
        low, high = (v.item() for v in values.aminmax())
        if low < 0 or high >= size:
            raise IndexError(
                f"{name} has values from {low} to {high}, but {what} takes 0 to {size - 1}"
            )
