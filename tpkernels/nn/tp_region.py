"""TPRegion: the part of a module between its column-parallel layers and its row-parallel one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from ..group import Group
from ..rng import RngTracker
from ..sharding.module import ShardedModule
from .fused_column_group import ColumnLayer, FusedColumnGroup
from .replicated_gradients import ReplicatedGradients


class RegionLayer(Protocol):
    """A layer that ends a region."""

    region: TPRegion | None


class RegionColumnLayer(ColumnLayer, RegionLayer, Protocol):
    """A layer that begins a region."""


class TPRegion:
    """The region of a module in which ranks compute different things.

    It is shared by the column-parallel and the row-parallel layers that are children of one
    `parent` module.

    1. The column layers are a fused column group (`fused_columns`).
    2. Dropout between the first column layer and the row layer draws from the rank's own stream
       (`rng`).
    3. Gradients of parameters that several ranks hold are summed (`replicated_gradients`).

    Args:
        parent: the module whose children the layers are.
        columns: column-parallel layers.
        row: the row-parallel layer, or None.
        grad_summed: (module, parameter name) of parameters that several ranks hold.
        group: the tensor-parallel group.
    """

    def __init__(
        self,
        parent: nn.Module,
        columns: Sequence[RegionColumnLayer],
        row: RegionLayer | None,
        grad_summed: Sequence[tuple[ShardedModule, str]],
        group: Group,
    ):
        self.parent, self.row = parent, row
        self.fused_columns = FusedColumnGroup(columns, group)
        self.replicated_gradients = ReplicatedGradients(grad_summed, group)
        self.rng = RngTracker(group.rank)
        self.active = False  # the parent is running
        self.may_draw_random = False
        for layer in columns:
            layer.region = self
        if row is not None:
            row.region = self
        parent.register_forward_pre_hook(self._begin, with_kwargs=True)
        parent.register_forward_hook(self._end, always_call=True)

    def _begin(self, parent, args, kwargs) -> None:
        self._end()
        self.active = True
        self.may_draw_random = self.row is not None and self._may_draw_random()
        self.replicated_gradients.begin()

    def _end(self, *_) -> None:
        self.active = self.may_draw_random = False
        self.fused_columns.clear()
        self.rng.restore()
        self.replicated_gradients.clear()

    def column(self, layer: ColumnLayer, input: Tensor) -> Tensor:
        """Return the output of a column layer, before its activation."""
        if self.may_draw_random:
            self.rng.fork(input.device)
        return self.fused_columns(layer, input) if self.active else layer.linear(input)

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
        dropout_type = nn.modules.dropout._DropoutNd
        return any(isinstance(m, dropout_type) and m.p > 0 for m in self.parent.modules())
