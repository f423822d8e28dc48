"""The part of a module between its column-parallel layers and its row-parallel one, where ranks compute different things."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..group import Group
from ..ops.comm import sum_gradients
from ..ops.linear import column_linears
from ..random import RankRandom
from .sharded import Sharded


class SplitRegion:
    """Shared by the column-parallel `siblings` and the row-parallel `row` that are children of one `parent` module.

    1. Siblings that read one input share one backward all-reduce. The first to be called runs all of them in one op and keeps
       the others' outputs for that very input object; they are dropped when the parent returns or raises. A sibling that is
       called with another input, twice, or not at all, or that has hooks of its own, stands for itself and stays right.
    2. Dropout between the first sibling and the row layer draws from a generator of the rank's own.
    3. Gradients of `summed` parameters (on several ranks, used by each for its own heads: q_norm, replicated KV heads) are
       summed over the ranks, in one all-reduce.
    """

    def __init__(
        self,
        parent: nn.Module,
        siblings: Sequence[nn.Module],
        row: nn.Module | None,
        summed: Sequence[tuple[Sharded, str]],
        group: Group,
    ):
        self.parent, self.siblings, self.row, self.summed, self.group = (
            parent,
            list(siblings),
            row,
            list(summed),
            group,
        )
        self.active = self.drops = (
            False  # `drops`: something in this call of the parent may draw random numbers
        )
        self.input: Tensor | None = None
        self.outputs: dict[nn.Module, Tensor] = {}
        self.random = RankRandom(group.rank)
        for module in (*self.siblings, *([row] if row is not None else [])):
            module.region = self
        parent.register_forward_pre_hook(self._begin, with_kwargs=True)
        parent.register_forward_hook(self._end, always_call=True)

    def _begin(self, parent, args, kwargs) -> None:
        self._end()
        self.active, self.drops = True, self.row is not None and self._drops()
        if self.summed and torch.is_grad_enabled() and self.group.size > 1:
            wanted = [
                (module, name)
                for module, name in self.summed
                if module._parameters[name].requires_grad
            ]
            if wanted:
                parameters = [module.stored(name) for module, name in wanted]
                totals = sum_gradients(
                    parameters,
                    [module.divided(name) for module, name in wanted],
                    self.group,
                    "replicated_gradients",
                )
                for (module, name), total in zip(wanted, totals, strict=True):
                    module._summed[name] = total

    def _end(self, *_) -> None:
        self.active = self.drops = False
        self.input = None
        self.outputs.clear()
        self.random.leave()
        for module, _name in self.summed:
            module._summed.clear()

    def column(self, layer, input: Tensor) -> Tensor:
        """The output of sibling `layer`, before its activation."""
        if self.drops:
            self.random.enter(input.device)
        if not self.active or not torch.is_grad_enabled() or len(self.siblings) < 2:
            return layer.linear(input)
        if self.input is None and not any(s._forward_pre_hooks for s in self.siblings):
            parameters = [s.weight_and_bias() for s in self.siblings]
            weights, biases = zip(*parameters, strict=True)
            share = sum(s.share for s in self.siblings)
            outputs = column_linears(
                input, weights, biases, self.group, layer.overlap, layer.tag, share
            )
            self.input, self.outputs = input, dict(zip(self.siblings, outputs, strict=True))
        if input is self.input and layer in self.outputs:
            return self.outputs.pop(layer)
        return layer.linear(input)

    def leave(self) -> None:
        """Called by the row layer: from here on ranks compute the same again."""
        self.random.leave()

    def _drops(self) -> bool:
        """Whether anything in the parent may draw random numbers: too often is harmless, too seldom is not."""
        if not self.parent.training:
            return False
        named = [*vars(self.parent).items(), *vars(getattr(self.parent, "config", self)).items()]
        if any("drop" in name and isinstance(value, float) and value > 0 for name, value in named):
            return True
        return any(
            m.p > 0 for m in self.parent.modules() if isinstance(m, nn.modules.dropout._DropoutNd)
        )
