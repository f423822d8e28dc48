"""Optimizer steps of a sharded model: the gradient norm, and float16's overflow."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .group import Group, GroupLike, resolve_group
from .sharding.module import sharded_modules
from .sharding.spec import ShardSpec

_ops = torch.ops.tpkernels


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the gradients of a sharded model by the unsharded model's norm, in place.

    Sharded gradients count on every rank, replicated ones once. DTensor parameters go to torch's
    own function.

    Collective: every rank of the group must call it.

    Args:
        parameters: as torch.nn.utils.clip_grad_norm_ takes them.
        max_norm: the norm that the gradients have at most afterwards.
        norm_type: order of the norm; torch.inf for the maximum.
        error_if_nonfinite: raise where the norm is not finite.
        foreach: as torch.nn.utils.clip_grad_norm_ takes it.

    Returns:
        The unsharded model's norm before clipping, a plain tensor.

    Raises:
        ValueError: DTensors mixed with plain tensors, or parameters sharded over several groups.
        RuntimeError: a norm that is not finite, with error_if_nonfinite.

    Example:
        >>> import tpkernels as tpk
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> tpk.clip_grad_norm_([weight], max_norm=1.0)
        tensor(5.)
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    kinds = {isinstance(p, DTensor) for p in parameters}
    if len(kinds) > 1:
        raise ValueError(
            "parameters mix DTensors and plain tensors: "
            "parallelize the whole model with one `dtensor` option"
        )
    if kinds == {True}:
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    sharded = _sharded_parameters()
    replicated_grads = []
    owned_grads = []
    groups: dict[str, Group] = {}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if id(parameter) not in sharded:
            replicated_grads.append(parameter.grad)
            continue
        group, spec = sharded[id(parameter)]
        groups[group.name] = group
        owned_grads += _owned_rows(parameter.grad, spec, group.rank)
    if len(groups) > 1:
        raise ValueError(
            f"parameters are sharded over {len(groups)} different groups: "
            "clip them a group at a time"
        )
    norm = get_total_norm(replicated_grads, norm_type, foreach=foreach).float()
    for group in groups.values():
        own_norm = get_total_norm(owned_grads, norm_type, foreach=foreach).float()
        norm = _norm_over_ranks(norm, own_norm, norm_type, group)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"the gradients' norm of order {norm_type} is {norm.item()}: "
            "pass error_if_nonfinite=False to clip all the same"
        )
    clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


def _sharded_parameters() -> dict[int, tuple[Group, ShardSpec]]:
    """Return the group and the spec of every parameter that ranks store in part, by id."""
    found = {}
    for module in sharded_modules():
        for name in module.shard_specs:
            if spec := module.stored_spec(name):
                found[id(module._parameters[name])] = module.group, spec
    return found


def _owned_rows(grad: Tensor, spec: ShardSpec, rank: int) -> list[Tensor]:
    """Return the gradient rows that this rank owns, so that rows of several ranks count once."""
    if not spec.has_shared_rows:
        return [grad]
    return [grad.narrow(spec.dim, start, stop - start) for start, stop in spec.owned_rows[rank]]


def _norm_over_ranks(
    replicated_norm: Tensor, own_norm: Tensor, norm_type: float, group: Group
) -> Tensor:
    """Combine the norm of replicated gradients with that of all ranks' own ones."""
    if norm_type == torch.inf:
        _ops.all_reduce_(own_norm, group.name, "max", "gradient_norm")
        return torch.maximum(replicated_norm.to(own_norm.device), own_norm)
    power = own_norm**norm_type
    _ops.all_reduce_(power, group.name, "sum", "gradient_norm")
    return (replicated_norm.to(power.device) ** norm_type + power) ** (1 / norm_type)


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for a sharded model: an overflow on one rank skips the step on all.

    Each rank sees the gradients of its own shards only. Stepping on some ranks would leave the
    replicated parameters different.

    Collective: every rank of the group must call it.

    Args:
        device: as torch.amp.GradScaler takes it.
        group: the tensor-parallel group; None for the "tp" group of `tpk.init_mesh`.
        **options: torch.amp.GradScaler's.

    Example:
        >>> scaler = tpk.GradScaler("cuda", group=mesh["tp"])  # doctest: +SKIP
    """

    def __init__(self, device: str = "cuda", *, group: GroupLike = None, **options):
        super().__init__(device, **options)
        self.group = resolve_group(group)

    def _unscale_grads_(self, *args, **kwargs):
        found = super()._unscale_grads_(*args, **kwargs)
        for found_inf in found.values():
            _ops.all_reduce_(found_inf, self.group.name, "max", "found_inf")
        return found
