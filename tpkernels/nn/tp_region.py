"""TPRegion: the part of a module between its column-parallel layers and its row-parallel one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..group import Group
from ..ops.collectives import all_reduce_gradients
from ..ops.column_linear import column_linears
from ..ops.linear import ReduceOptions
from ..overlap.schedule import Overlap
from ..rng import RngTracker
from ..sharding.module import ShardedModule


class RegionLayer(Protocol):
    """A layer that begins or ends a region."""

    region: TPRegion | None


class ColumnLayer(RegionLayer, Protocol):
    """A ColumnParallelLinear, as its region sees it."""

    overlap: Overlap
    tag: str
    max_shard_size: int
    _forward_pre_hooks: dict

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]: ...
    def linear(self, input: Tensor) -> Tensor: ...


class TPRegion:
    """The region of a module in which ranks compute different things.

    It is shared by the column-parallel and the row-parallel layers that are children of one
    `parent` module.

    1. The column layers are a fused column group: those that read one input share one backward
       all-reduce. The first to be called runs all of them in one op and keeps the others' outputs
       for that very input object. They are dropped when the parent returns or raises. A layer that
       is called with another input, twice, or not at all, or that has hooks of its own, falls back
       to its own all-reduce; results do not change.
    2. Dropout between the first column layer and the row layer draws from the rank's own stream.
    3. Gradients of `grad_summed` parameters (held by several ranks, each using them for its own
       heads: q_norm, replicated KV heads) are summed over the ranks, in one all-reduce.

    Args:
        parent: the module whose children the layers are.
        columns: column-parallel layers.
        row: the row-parallel layer, or None.
        grad_summed: (module, parameter name).
        group: the tensor-parallel group.
    """

    def __init__(
        self,
        parent: nn.Module,
        columns: Sequence[ColumnLayer],
        row: RegionLayer | None,
        grad_summed: Sequence[tuple[ShardedModule, str]],
        group: Group,
    ):
        self.parent, self.columns, self.row = parent, list(columns), row
        self.grad_summed, self.group = list(grad_summed), group
        self.rng = RngTracker(group.rank)
        self.active = False  # the parent is running
        self.may_draw_random = False
        self.input: Tensor | None = None
        self.outputs: dict[ColumnLayer, Tensor] = {}
        for layer in self.columns:
            layer.region = self
        if row is not None:
            row.region = self
        parent.register_forward_pre_hook(self._begin, with_kwargs=True)
        parent.register_forward_hook(self._end, always_call=True)

    def _begin(self, parent, args, kwargs) -> None:
        self._end()
        self.active = True
        self.may_draw_random = self.row is not None and self._may_draw_random()
        if self.grad_summed and torch.is_grad_enabled() and self.group.size > 1:
            self._sum_gradients()

    def _sum_gradients(self) -> None:
        wanted, parameters = [], []
        for module, name in self.grad_summed:
            parameter = module.stored_tensor(name)
            if parameter is not None and parameter.requires_grad:
                wanted.append((module, name))
                parameters.append(parameter)
        if not wanted:
            return
        totals = all_reduce_gradients(
            parameters,
            [module.stored_spec(name) for module, name in wanted],
            self.group,
            "replicated_gradients",
        )
        for (module, name), total in zip(wanted, totals, strict=True):
            module.grad_summed[name] = total

    def _end(self, *_) -> None:
        self.active = self.may_draw_random = False
        self.input = None
        self.outputs.clear()
        self.rng.restore()
        for module, _name in self.grad_summed:
            module.grad_summed.clear()

    def column(self, layer: ColumnLayer, input: Tensor) -> Tensor:
        """Return the output of a column layer, before its activation."""
        if self.may_draw_random:
            self.rng.fork(input.device)
        if not self.active or not torch.is_grad_enabled() or len(self.columns) < 2:
            return layer.linear(input)
        if self.input is None and not any(c._forward_pre_hooks for c in self.columns):
            weights, biases = zip(*(c.weight_and_bias() for c in self.columns), strict=True)
            max_n = sum(c.max_shard_size for c in self.columns)
            options = ReduceOptions(self.group, max_n, layer.overlap, layer.tag)
            outputs = column_linears(input, weights, biases, options)
            self.input, self.outputs = input, dict(zip(self.columns, outputs, strict=True))
        if input is self.input and layer in self.outputs:
            return self.outputs.pop(layer)
        return layer.linear(input)

    def _may_draw_random(self) -> bool:
        """Return True if anything in the parent may draw random numbers.

        False positives are harmless; false negatives are not.
        """
        if not self.parent.training:
            return False
        attributes = [*vars(self.parent).items()]
        if (config := getattr(self.parent, "config", None)) is not None:
            attributes += vars(config).items()
        for name, value in attributes:
            if "drop" in name and isinstance(value, float) and value > 0:
                return True
        dropouts = (
            m for m in self.parent.modules() if isinstance(m, nn.modules.dropout._DropoutNd)
        )
        return any(dropout.p > 0 for dropout in dropouts)
