"""ShardedModule: a module's parameters over a tensor-parallel group, as a mixin."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..autocast import autocast
from ..group import Group
from .spec import ShardSpec

# clip_grad_norm_ is given parameters only, and their attributes survive neither FSDP nor deepcopy:
# it finds the modules here.
_alive: weakref.WeakSet[ShardedModule] = weakref.WeakSet()


class ShardedModule(nn.Module):
    """Mixin: which part of each of its own parameters a rank stores, and which its forward reads.

    Attributes:
        group: the tensor-parallel group.
        shard_specs: parameter name -> ShardSpec in the stock layout, or None for a parameter that
            every rank holds in full.
    """

    group: Group
    shard_specs: dict[str, ShardSpec | None]

    def _init_sharded(self, group: Group) -> None:
        self.group, self.shard_specs = group, {}
        # Parameters whose gradients are summed over the ranks; a TPRegion sets them for a forward.
        self.grad_summed: dict[str, Tensor] = {}
        _alive.add(self)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        _alive.add(self)

    def register_shard(self, name: str, full: Tensor | None, spec: ShardSpec | None) -> None:
        """Register this rank's shard of the stock parameter `full`."""
        if full is None:
            self.register_parameter(name, None)
            return
        self.shard_specs[name] = spec
        # A copy: a view would keep the full parameter alive.
        shard = self.own_shard(name, full.detach()).clone(memory_format=torch.contiguous_format)
        self.register_parameter(name, nn.Parameter(shard, full.requires_grad))

    def register_empty_shard(
        self, name: str, shape: tuple[int, ...], spec: ShardSpec | None, device, dtype
    ) -> None:
        """Register an uninitialised shard of a stock parameter of `shape`."""
        self.shard_specs[name] = spec
        sizes = list(shape)
        if stored := self.stored_spec(name):
            sizes[stored.dim] = stored.shard_sizes[self.group.rank]
        shard = torch.empty(sizes, device=device, dtype=dtype)
        self.register_parameter(name, nn.Parameter(shard))

    def stored_spec(self, name: str) -> ShardSpec | None:
        """Return the spec of a parameter that this rank stores in part, None for a full one."""
        spec = self.shard_specs.get(name)
        return None if spec is None or spec.replicated or self.group.size == 1 else spec

    def own_shard(self, name: str, full: Tensor) -> Tensor:
        """Return the part of the stock parameter `full` that this rank stores."""
        spec = self.stored_spec(name)
        return full if spec is None else spec.shard(full, self.group.rank)

    def stored_tensor(self, name: str, cast: bool = False) -> Tensor | None:
        """Return what this rank stores of a parameter, in autograd.

        Args:
            name: the parameter.
            cast: cast to autocast's dtype, once while autocast is on.
        """
        parameter = self._parameters[name]
        if parameter is None:
            return None
        tensor: Tensor = parameter
        # Before to_local: autocast caches casts of leaves only.
        if cast and torch.is_autocast_enabled(tensor.device.type):
            tensor = autocast(tensor, tensor.device.type)
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def local_tensor(self, name: str, cast: bool = False) -> Tensor | None:
        """Return what this rank's forward reads of a parameter.

        It has no padding, and is this rank's part of a replicated parameter; see `stored_tensor`.
        """
        tensor = self.grad_summed.get(name)
        if tensor is None:
            tensor = self.stored_tensor(name, cast)
        spec = self.shard_specs.get(name)
        if tensor is None or spec is None or self.group.size == 1:
            return tensor
        if spec.replicated:
            return spec.shard(tensor, self.group.rank)
        size = spec.shard_sizes[self.group.rank]
        return tensor if tensor.size(spec.dim) == size else tensor.narrow(spec.dim, 0, size)

    @torch.no_grad()
    def copy_from_full(self, name: str, full: Tensor) -> None:
        """Copy this rank's part of the stock parameter `full` into the parameter."""
        tensor, shard = self.stored_tensor(name), self.own_shard(name, full)
        assert tensor is not None
        tensor[tuple(slice(size) for size in shard.shape)].copy_(shard)


def sharded_modules() -> list[ShardedModule]:
    """Return every sharded module that is alive in this process."""
    return list(_alive)


def shard_dtensor(local: Tensor, group: Group, dim: int, size: int) -> DTensor:
    """Return `local` as this rank's part of a DTensor with `size` in dimension `dim`.

    DTensor.from_local would guess the size from the first rank's.
    """
    shape = list(local.shape)
    shape[dim] = size
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, group.mesh, [Shard(dim)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def localize(module: nn.Module, group: Group) -> None:
    """Make the forward of a stock module, such as a norm, see its parameters as local tensors.

    Its class becomes a subclass: deepcopy and fully_shard keep that, and everybody else still
    sees the parameters.
    """
    if isinstance(module, ShardedModule):
        return
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    stock: Any = type(module)

    @functools.wraps(stock.forward)
    def forward(self, *args, **kwargs):
        attributes = vars(self)  # found before nn.Module looks among the parameters
        attributes.update((name, self.local_tensor(name)) for name in names)
        try:
            return stock.forward(self, *args, **kwargs)
        finally:
            for name in names:
                del attributes[name]

    members = {"forward": forward, "__module__": stock.__module__}
    localized: Any = module
    localized.__class__ = type(f"Local{stock.__name__}", (ShardedModule, stock), members)
    localized._init_sharded(group)
    localized.shard_specs.update(dict.fromkeys(names))
