"""Modules whose parameters are divided over a tensor-parallel group."""

from __future__ import annotations

import functools
import weakref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..group import Group
from ..ops.autocast import autocast
from ..shard import Split

# Every sharded module alive: clip_grad_norm_ is given parameters only, and attributes on those survive neither FSDP nor deepcopy.
_alive: weakref.WeakSet[Sharded] = weakref.WeakSet()


class Sharded:
    """Mixin of an nn.Module: what each of its own parameters is, and what of it this rank's forward reads.

    Attributes:
        group: the tensor-parallel group.
        splits: parameter name -> Split in the stock layout, or None for one that every rank holds whole.
    """

    group: Group
    splits: dict[str, Split | None]

    def _init_sharded(self, group: Group) -> None:
        self.group, self.splits = group, {}
        self._summed: dict[
            str, Tensor
        ] = {}  # set by a SplitRegion for one forward: parameters whose gradients are summed
        _alive.add(self)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        _alive.add(self)

    def put(self, name: str, full: Tensor | None, split: Split | None) -> None:
        """Registers this rank's shard of the stock parameter `full`."""
        if full is None:
            self.register_parameter(name, None)
            return
        self.splits[name] = split
        # A copy: a view would keep the whole parameter alive.
        shard = self.own(name, full.detach()).clone(memory_format=torch.contiguous_format)
        self.register_parameter(name, nn.Parameter(shard, full.requires_grad))

    def put_empty(
        self, name: str, shape: tuple[int, ...], split: Split | None, device, dtype
    ) -> None:
        self.splits[name] = split
        shape = list(shape)
        if self.divided(name):
            shape[split.dim] = split.sizes[self.group.rank]
        self.register_parameter(name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def divided(self, name: str) -> Split | None:
        """The split of a parameter of which this rank stores its own part only, None for one that it stores whole."""
        split = self.splits.get(name)
        return None if split is None or split.replicated or self.group.size == 1 else split

    def own(self, name: str, full: Tensor) -> Tensor:
        """What this rank stores of the stock parameter `full`."""
        split = self.divided(name)
        return full if split is None else split.shard(full, self.group.rank)

    def stored(self, name: str, cast: bool = False) -> Tensor | None:
        """This rank's tensor of a parameter, in autograd; with `cast`, in autocast's dtype, cast once while autocast is on."""
        parameter = self._parameters[name]
        if parameter is None:
            return None
        if cast:  # before to_local: autocast caches casts of leaves only
            parameter = autocast(parameter, parameter.device.type)
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter

    def local(self, name: str, cast: bool = False) -> Tensor | None:
        """What this rank's forward reads of a parameter: without padding, and its own part of a replicated one."""
        tensor = self._summed.get(name)
        if tensor is None:
            tensor = self.stored(name, cast)
        split = self.splits.get(name)
        if tensor is None or split is None or self.group.size == 1:
            return tensor
        if split.replicated:
            return split.shard(tensor, self.group.rank)
        size = split.sizes[self.group.rank]
        return tensor if tensor.size(split.dim) == size else tensor.narrow(split.dim, 0, size)

    @torch.no_grad()
    def fill(self, name: str, full: Tensor) -> None:
        """Copies this rank's part of the stock parameter `full` into the parameter."""
        tensor, shard = self.stored(name), self.own(name, full)
        tensor[tuple(slice(size) for size in shard.shape)].copy_(shard)


def sharded_modules() -> list[Sharded]:
    return list(_alive)


def shard_dtensor(local: Tensor, group: Group, dim: int, size: int) -> DTensor:
    """`local` as this rank's part of a DTensor that has `size` in dimension `dim`, where from_local would guess."""
    shape = list(local.shape)
    shape[dim] = size
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, group.mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def localize(module: nn.Module, group: Group) -> None:
    """Makes the forward of a stock module that every rank runs whole (a norm) see its parameters as local tensors.

    Its class becomes a subclass: deepcopy and fully_shard keep that, and everyone else still sees the parameters.
    """
    if isinstance(module, Sharded):
        return
    names = [name for name, p in module._parameters.items() if p is not None]
    stock = type(module)

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        attributes = vars(self)  # found before nn.Module looks among the parameters
        attributes.update((name, self.local(name)) for name in names)
        try:
            return stock.forward(self, *args, **kwargs)
        finally:
            for name in names:
                del attributes[name]

    module.__class__ = type(
        f"Local{stock.__name__}",
        (Sharded, stock),
        {"forward": forward, "__module__": stock.__module__},
    )
    module._init_sharded(group)
    module.splits.update(dict.fromkeys(names))
