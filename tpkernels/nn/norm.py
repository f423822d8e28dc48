"""Norms that every rank computes whole, with the residual addition before them in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.norm import layer_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm over the last dimension; forward(input, residual) returns (norm(input + residual), input + residual)."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(_features(normalized_shape), eps, elementwise_affine, device, dtype)

    def epsilon(self, dtype: torch.dtype) -> float:
        return self.eps if self.eps is not None else torch.finfo(dtype).eps  # torch's own default

    def forward(self, input: Tensor, residual: Tensor | None = None):
        return rms_norm(input, self.weight, self.epsilon(input.dtype), residual)


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm over the last dimension; forward(input, residual) returns (norm(input + residual), input + residual)."""

    def __init__(
        self,
        normalized_shape: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__(_features(normalized_shape), eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None):
        return layer_norm(input, self.weight, self.bias, self.eps, residual)


def _features(normalized_shape) -> int:
    if not isinstance(normalized_shape, int):
        raise ValueError(
            f"normalized_shape must be an int, the size of the last dimension, got {normalized_shape!r}"
        )
    return normalized_shape
