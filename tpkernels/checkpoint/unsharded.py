"""The state dict of the unsplit model, from and into a split one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..nn.sharded import Sharded
from ..ops.comm import all_gather_shards
from ..shard import Split


@torch.no_grad()
def unsharded_state_dict(
    model: nn.Module, *, rank0_only: bool = False, cpu_offload: bool = False
) -> dict[str, Tensor]:
    """The stock model's state dict: its names, shapes and layout, gathered over the ranks one parameter at a time.

    Also of a model under fully_shard. Every rank must call it.

    Args:
        rank0_only: ranks other than 0 get {}.
        cpu_offload: tensors are moved to the CPU as they are gathered.
    """
    keep = not rank0_only or not dist.is_initialized() or dist.get_rank() == 0
    owners, gathered, out = _owners(model), {}, {}
    for key, value in model.state_dict().items():
        if key in owners:
            module, name = owners[key]
            parameter = module._parameters[name]
            if id(parameter) not in gathered:  # tied parameters once
                whole = _gather(parameter.detach(), module, name)
                gathered[id(parameter)] = (whole.cpu() if cpu_offload else whole) if keep else None
            value = gathered[id(parameter)]
        elif torch.is_tensor(value) and keep:
            value = value.detach().to("cpu", copy=True) if cpu_offload else value.detach().clone()
        if keep:
            out[key] = value
    return out


@torch.no_grad()
def unsharded_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The stock model's gradients by parameter name, as named_parameters gives them (tied ones once). Every rank must call it."""
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
    """Copies this rank's shards out of a stock state dict, whatever TP size it comes from. No communication.

    Raises:
        KeyError: with `strict`, keys that are missing or unexpected.
        ValueError: a tensor of another shape. Nothing has been copied then.
    """
    owners = _owners(model)
    mine = model.state_dict()
    missing, unexpected = (
        [k for k in mine if k not in state_dict],
        [k for k in state_dict if k not in mine],
    )
    if strict and (missing or unexpected):
        raise KeyError(
            f"state_dict does not fit {type(model).__name__}: missing {missing or 'none'}, unexpected {unexpected or 'none'} (strict=False ignores them)"
        )
    for key, value in mine.items():
        if key in state_dict and torch.is_tensor(value):
            shape = _stock_shape(*owners[key]) if key in owners else tuple(value.shape)
            if tuple(state_dict[key].shape) != shape:
                raise ValueError(
                    f"state_dict[{key!r}] has shape {tuple(state_dict[key].shape)}, but the unsplit model's is {shape}"
                )
    for key, value in mine.items():
        if key not in state_dict:
            continue
        full = state_dict[key]
        if key in owners:
            module, name = owners[key]
            _store(full, module, name)
        elif torch.is_tensor(value):
            value.copy_(full)


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """State-dict key -> the module and the name of the parameter, tied ones under every key."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _divided(module: nn.Module, name: str) -> Split | None:
    """Sharded.divided, of any module."""
    return module.divided(name) if isinstance(module, Sharded) else None


def _stock_shape(module: nn.Module, name: str) -> tuple[int, ...]:
    shape = list(module._parameters[name].shape)
    if split := _divided(module, name):
        shape[split.dim] = split.size
    return tuple(shape)


def _gather(tensor: Tensor, module: nn.Module, name: str) -> Tensor:
    """A parameter, or its gradient, in the stock layout."""
    split = _divided(module, name)
    if isinstance(tensor, DTensor):
        full = tensor.full_tensor()
        # Where Shard cannot say how the ranks divide it, the DTensor is their padded parts one behind the other.
        return (
            full.clone()
            if split is None or split.is_chunk
            else split.unshard(full.split(split.stored_size, split.dim))
        )
    if split is None:
        return tensor.clone()
    return all_gather_shards(tensor, split, module.group, "state_dict")


def _store(full: Tensor, module: nn.Module, name: str) -> None:
    """Copies this rank's part of the stock tensor `full` into the parameter."""
    parameter, split = module._parameters[name], _divided(module, name)
    if not isinstance(parameter, DTensor):
        parameter.copy_(full if split is None else split.shard(full, module.group.rank))
        return
    if split is not None and not split.is_chunk:
        full = torch.cat(
            [split.pad(split.shard(full, r)) for r in range(module.group.size)], split.dim
        )
    # fully_shard may have divided it further.
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    parameter.to_local().copy_(
        full[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
    )
