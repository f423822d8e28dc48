"""ReplicatedGradients: the sum over ranks of gradients of parameters that several ranks hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..group import Group
from ..ops.collectives import all_reduce_gradients
from ..sharding.module import ShardedModule


class ReplicatedGradients:
    """Parameters held by several ranks, each using them for its own heads.

    Examples are q_norm and replicated KV heads. Their gradients are summed over the ranks, in one
    all-reduce.

    Args:
        parameters: (module, parameter name).
        group: the tensor-parallel group.
    """

    def __init__(self, parameters: Sequence[tuple[ShardedModule, str]], group: Group):
        self.parameters, self.group = list(parameters), group

    def begin(self) -> None:
        """Make the modules' forwards read parameters whose gradients are summed."""
        if not self.parameters or not torch.is_grad_enabled() or self.group.size == 1:
            return
        wanted, tensors = [], []
        for module, name in self.parameters:
            tensor = module.stored_tensor(name)
            if tensor is not None and tensor.requires_grad:
                wanted.append((module, name))
                tensors.append(tensor)
        if not wanted:
            return
        specs = [module.stored_spec(name) for module, name in wanted]
        summed = all_reduce_gradients(tensors, specs, self.group, "replicated_gradients")
        for (module, name), tensor in zip(wanted, summed, strict=True):
            module.grad_summed[name] = tensor

    def clear(self) -> None:
        """Make the modules read their own parameters again."""
        for module, _name in self.parameters:
            module.grad_summed.clear()
