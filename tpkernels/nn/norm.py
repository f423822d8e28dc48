"""Norms that every rank computes in full, with the residual addition before them in one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.norm import layer_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension, with an optional residual.

    Args:
        normalized_shape: size of the last dimension.
        eps: added to the mean of squares; None takes the input dtype's epsilon.
        elementwise_affine: have a weight.
        device: of the weight.
        dtype: of the weight.

    Raises:
        ValueError: normalized_shape is not an int.

    Example:
        >>> norm = RMSNorm(16)
        >>> normed, total = norm(torch.ones(2, 16), residual=torch.ones(2, 16))
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(_features(normalized_shape), eps, elementwise_affine, device, dtype)

    def epsilon(self, dtype: torch.dtype) -> float:
        """Return eps, or torch's default for inputs of `dtype`."""
        return self.eps if self.eps is not None else torch.finfo(dtype).eps

    def forward(self, input: Tensor, residual: Tensor | None = None):
        """Return norm(input), or (norm(input + residual), input + residual)."""
        return rms_norm(input, self.weight, self.epsilon(input.dtype), residual)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension, with an optional residual.

    Args:
        normalized_shape: size of the last dimension.
        eps: added to the variance.
        elementwise_affine: have a weight.
        bias: have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: normalized_shape is not an int.

    Example:
        >>> norm = LayerNorm(16)
        >>> normed, total = norm(torch.ones(2, 16), residual=torch.ones(2, 16))
    """

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(_features(normalized_shape), eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None):
        """Return norm(input), or (norm(input + residual), input + residual)."""
        return layer_norm(input, self.weight, self.bias, self.eps, residual)


def _features(normalized_shape: object) -> int:
    if not isinstance(normalized_shape, int):
        raise ValueError(
            f"normalized_shape must be an int, the size of the last dimension, "
            f"got {normalized_shape!r}"
        )
    return normalized_shape
