"""FusedColumnGroup: column layers that read one input and share one backward all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..group import Group
from ..ops.column_linear import column_linears
from ..ops.linear import ReduceOptions
from ..overlap.schedule import Overlap


class ColumnLayer(Protocol):
    """A ColumnParallelLinear, as its group sees it."""

    overlap: Overlap
    tag: str
    max_shard_size: int
    _forward_pre_hooks: dict

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return what this rank's forward reads."""
        ...

    def linear(self, input: Tensor) -> Tensor:
        """Compute the layer alone."""
        ...


class FusedColumnGroup:
    """Column layers of one parent module, such as q, k, v or gate, up.

    The first to be called runs all of them in one op and keeps the others' outputs for that very
    input object. A layer that is called with another input, twice, or not at all, or that has
    hooks of its own, falls back to its own all-reduce; results do not change.

    Args:
        layers: the column layers.
        group: the tensor-parallel group.
    """

    def __init__(self, layers: Sequence[ColumnLayer], group: Group):
        self.layers, self.group = list(layers), group
        self.input: Tensor | None = None
        self.outputs: dict[ColumnLayer, Tensor] = {}

    def __call__(self, layer: ColumnLayer, input: Tensor) -> Tensor:
        """Return the output of a layer, before its activation."""
        if not torch.is_grad_enabled() or len(self.layers) < 2:
            return layer.linear(input)
        if self.input is None and not any(c._forward_pre_hooks for c in self.layers):
            weights, biases = zip(*(c.weight_and_bias() for c in self.layers), strict=True)
            max_n = sum(c.max_shard_size for c in self.layers)
            options = ReduceOptions(self.group, max_n, layer.overlap, layer.tag)
            outputs = column_linears(input, weights, biases, options)
            self.input, self.outputs = input, dict(zip(self.layers, outputs, strict=True))
        if input is self.input and layer in self.outputs:
            return self.outputs.pop(layer)
        return layer.linear(input)

    def clear(self) -> None:
        """Drop the outputs that nobody asked for."""
        self.input = None
        self.outputs.clear()
