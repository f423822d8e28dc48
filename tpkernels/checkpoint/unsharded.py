"""The state dict of the unsharded model, from and into a sharded one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..ops.collectives import all_gather_shards
from ..sharding.module import ShardedModule
from ..sharding.spec import ShardSpec

Owner = tuple[nn.Module, str]  # a module and the name of its parameter


@torch.no_grad()
def unsharded_state_dict(
    model: nn.Module, *, rank0_only: bool = False, cpu_offload: bool = False
) -> dict[str, Tensor]:
    """Return the stock model's state dict, gathered over the ranks one parameter at a time.

    It works for a model under fully_shard too.

    Collective: every rank of the group must call it.

    Args:
        model: a sharded model.
        rank0_only: ranks other than 0 get {}.
        cpu_offload: tensors are moved to the CPU as they are gathered.

    Returns:
        Stock names, shapes and layout.

    Example:
        >>> state = unsharded_state_dict(nn.Linear(2, 3))
        >>> sorted(state)
        ['bias', 'weight']
    """
    keep = not rank0_only or not dist.is_initialized() or dist.get_rank() == 0
    owners, gathered, out = _owners(model), {}, {}
    for key, value in model.state_dict().items():
        if key in owners:
            module, name = owners[key]
            parameter = module._parameters[name]
            assert parameter is not None
            if id(parameter) not in gathered:  # tied parameters once
                full = _gather(parameter.detach(), module, name)
                gathered[id(parameter)] = (full.cpu() if cpu_offload else full) if keep else None
            value = gathered[id(parameter)]
        elif torch.is_tensor(value) and keep:
            value = value.detach().to("cpu" if cpu_offload else value.device, copy=True)
        if keep:
            out[key] = value
    return out


@torch.no_grad()
def unsharded_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the stock model's gradients.

    Collective: every rank of the group must call it.

    Args:
        model: a sharded model after backward.

    Returns:
        Gradients by parameter name, as named_parameters gives them (tied ones once).

    Example:
        >>> unsharded_gradients(nn.Linear(2, 3))
        {}
    """
    owners = _owners(model)
    return {
        key: _gather(p.grad, *owners[key])
        for key, p in model.named_parameters()
        if p.grad is not None
    }


@torch.no_grad()
def load_unsharded_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True
) -> None:
    """Copy this rank's shards from a stock state dict, whatever TP size it comes from.

    It does not communicate.

    Args:
        model: a sharded model.
        state_dict: the unsharded model's.
        strict: refuse missing and unexpected keys.

    Raises:
        KeyError: with `strict`, keys that are missing or unexpected.
        ValueError: a tensor of another shape. Nothing has been copied then.

    Example:
        >>> stock, other = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> load_unsharded_state_dict(other, stock.state_dict())
        >>> torch.equal(other.weight, stock.weight)
        True
    """
    owners = _owners(model)
    own_state = model.state_dict()
    missing = [key for key in own_state if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own_state]
    if strict and (missing or unexpected):
        raise KeyError(
            f"state_dict does not fit {type(model).__name__}: missing {missing or 'none'}, "
            f"unexpected {unexpected or 'none'} (strict=False ignores them)"
        )
    found = {
        key: value
        for key, value in own_state.items()
        if key in state_dict and (key in owners or torch.is_tensor(value))
    }
    for key, value in found.items():
        shape = _stock_shape(*owners[key]) if key in owners else tuple(value.shape)
        if tuple(state_dict[key].shape) != shape:
            raise ValueError(
                f"state_dict[{key!r}] has shape {tuple(state_dict[key].shape)}, "
                f"but the unsharded model's is {shape}"
            )
    for key, value in found.items():
        if key in owners:
            _copy_shard(state_dict[key], *owners[key])
        else:
            value.copy_(state_dict[key])


def _owners(model: nn.Module) -> dict[str, Owner]:
    """Return the owner of every parameter by its state-dict key, tied ones under every key."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _stored_spec(module: nn.Module, name: str) -> ShardSpec | None:
    """Return ShardedModule.stored_spec, for any module."""
    return module.stored_spec(name) if isinstance(module, ShardedModule) else None


def _stock_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    parameter = module._parameters[name]
    assert parameter is not None
    shape = list(parameter.shape)
    if spec := _stored_spec(module, name):
        shape[spec.dim] = spec.size
    return tuple(shape)


def _gather(tensor: Tensor, module: nn.Module, name: str) -> Tensor:
    """Return a parameter, or its gradient, in the stock layout."""
    spec = _stored_spec(module, name)
    if isinstance(tensor, DTensor):
        full = tensor.full_tensor()
        if spec is None or spec.is_chunk:
            return full.clone()
        # Shard cannot say how the ranks divide it: the DTensor is their padded shards in a row.
        return spec.unshard(full.split(spec.padded_shard_size, spec.dim))
    if spec is None:
        return tensor.clone()
    assert isinstance(module, ShardedModule)
    return all_gather_shards(tensor, spec, module.group, "state_dict")


def _copy_shard(full: Tensor, module: nn.Module, name: str) -> None:
    """Copy this rank's part of the stock tensor `full` into the parameter."""
    parameter, spec = module._parameters[name], _stored_spec(module, name)
    assert parameter is not None
    if not isinstance(parameter, DTensor):
        own = module.own_shard(name, full) if isinstance(module, ShardedModule) else full
        parameter.copy_(own)
        return
    if spec is not None and not spec.is_chunk:
        shards = [spec.pad(spec.shard(full, r)) for r in range(len(spec.intervals))]
        full = torch.cat(shards, spec.dim)
    # fully_shard may have divided it further.
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    index = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    parameter.to_local().copy_(full[index])
