"""What an optimizer step needs to know about split parameters: the gradient norm, and float16's overflow."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .group import Group, resolve_group
from .nn.sharded import sharded_modules
from .shard import Split

_ops = torch.ops.tpkernels


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ for a split model: clips by, and returns, the unsplit model's norm, a plain tensor.

    Split gradients are counted on every rank, whole ones once. DTensor parameters go to torch's own function.

    Raises:
        ValueError: DTensors mixed with plain tensors, or parameters split over different groups.
        RuntimeError: a norm that is not finite, with error_if_nonfinite.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    kinds = {isinstance(p, DTensor) for p in parameters}
    if len(kinds) > 1:
        raise ValueError(
            "parameters mix DTensors and plain tensors: parallelize the whole model with one `dtensor` option"
        )
    if kinds == {True}:
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, max_norm, norm_type, error_if_nonfinite, foreach
        )
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    groups: dict[int, Group] = {}
    splits: dict[int, Split] = {}
    for module in sharded_modules():
        for name in module.splits:
            if split := module.divided(name):
                groups[id(module._parameters[name])], splits[id(module._parameters[name])] = (
                    module.group,
                    split,
                )
    with_grad = [p for p in parameters if p.grad is not None]
    mine = [p for p in with_grad if id(p) in groups]
    whole = [p.grad for p in with_grad if id(p) not in groups]
    names = {groups[id(p)].name: groups[id(p)] for p in mine}
    if len(names) > 1:
        raise ValueError(
            f"parameters are split over {len(names)} different groups: clip them a group at a time"
        )
    norm = get_total_norm(whole, norm_type, foreach=foreach).float()
    if names:
        (group,) = names.values()
        once = [part for p in mine for part in _counted_once(p.grad, splits[id(p)], group.rank)]
        split_norm = get_total_norm(once, norm_type, foreach=foreach).float()
        if norm_type == torch.inf:
            _ops.all_reduce_(split_norm, group.name, "max", "gradient_norm")
            norm = torch.maximum(norm.to(split_norm.device), split_norm)
        else:
            power = split_norm**norm_type
            _ops.all_reduce_(power, group.name, "sum", "gradient_norm")
            norm = (norm.to(power.device) ** norm_type + power) ** (1 / norm_type)
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"the gradients' norm of order {norm_type} is {norm.item()}: pass error_if_nonfinite=False to clip all the same"
        )
    clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


def _counted_once(grad: Tensor, split: Split, rank: int) -> list[Tensor]:
    """What of a shard's gradient this rank counts: rows that several ranks hold belong to the first."""
    return (
        [grad.narrow(split.dim, start, stop - start) for start, stop in split.owned[rank]]
        if split.overlaps
        else [grad]
    )


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler for a model split over `group`: an overflow on one rank skips the step on all of them.

    Each rank sees the gradients of its own shards only; stepping on some ranks would leave the replicated parameters different.
    """

    def __init__(self, device: str = "cuda", *, group=None, **options):
        super().__init__(device, **options)
        self.group = resolve_group(group)

    def _unscale_grads_(self, *args, **kwargs):
        found = super()._unscale_grads_(*args, **kwargs)
        for found_inf in found.values():
            _ops.all_reduce_(found_inf, self.group.name, "max", "found_inf")
        return found
