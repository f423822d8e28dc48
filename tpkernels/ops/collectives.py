"""Collectives: the public all-reduce, and the Functions that move activations between layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed import ProcessGroup

from .. import _C
from ..group import Group, GroupLike, resolve_group
from ..process_group import find_process_group
from ..sharding.spec import ShardSpec
from .collective_log import log_fake
from .fake import register_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels


@register_fake("all_reduce_")
def _(self, group, op, tag):
    log_fake("all_reduce", tag, group, self)


@register_fake("all_gather")
def _(self, group, tag):
    out = self.new_empty(find_process_group(group).size(), *self.shape)
    log_fake("all_gather", tag, group, out)
    return out


@register_fake("empty_comm_buffer")
def _(like, size):
    return like.new_empty(size)


def all_reduce_(tensor: Tensor, group: GroupLike) -> Tensor:
    """Sum `tensor` over the ranks of `group`, in place; not differentiable.

    Collective: every rank of the group must call it.

    Args:
        tensor: one shape and dtype on every rank; float32, bfloat16, float16, float64, int32 or
            int64.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.

    Returns:
        `tensor`, the same bits on every rank.

    Raises:
        ValueError: `tensor` requires a gradient while gradients are recorded.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> tpk.all_reduce_(torch.ones(2), mesh["tp"])
        tensor([1., 1.])
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "tensor requires grad, and all_reduce_ is not differentiable: "
            "pass tensor.detach(), or call it under torch.no_grad()"
        )
    name = group.group_name if isinstance(group, ProcessGroup) else resolve_group(group).name
    if type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack() and not is_compiling():
        _C.all_reduce_(tensor, name)  # the dispatcher is most of a small all-reduce's time
    else:
        _ops.all_reduce_(tensor, name, "sum", "all_reduce")
    return tensor


def sum_over_ranks(tensors: Sequence[Tensor], group: Group, tag: str) -> list[Tensor]:
    """Sum tensors of one dtype over the ranks, in one all-reduce.

    Collective: every rank of the group must call it.
    """
    sizes = [t.numel() for t in tensors]
    flat = _ops.empty_comm_buffer(tensors[0], [sum(sizes)])
    torch.cat([t.reshape(-1) for t in tensors], out=flat)
    _ops.all_reduce_(flat, group.name, "sum", tag)
    # Clones: a gradient that is a view at an offset cannot be deep-copied inside a DTensor.
    return [s.view(t.shape).clone() for s, t in zip(flat.split(sizes), tensors, strict=True)]


def all_gather_shards(shard: Tensor, spec: ShardSpec, group: Group, tag: str) -> Tensor:
    """Return every rank's `shard` put together along `spec.dim`.

    Collective: every rank of the group must call it.
    """
    shape = list(shard.shape)
    shape[spec.dim] = spec.padded_shard_size
    padded = _ops.empty_comm_buffer(shard, shape)
    padded.narrow(spec.dim, 0, shard.size(spec.dim)).copy_(shard)
    return spec.unshard(_ops.all_gather(padded, group.name, tag).unbind(0))


class _GatherFromTP(torch.autograd.Function):
    """Activations sharded by features -> full ones on every rank.

    x   [..., N_r]   y  = all ranks' x put together   [..., N]   1 all-gather
    dy  [..., N]     dx = this rank's part of dy      [..., N_r]  no communication
    """

    @staticmethod
    def forward(ctx, x, spec, group, tag):
        ctx.spec, ctx.rank = spec, group.rank
        return all_gather_shards(x, spec, group, tag)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.spec.shard(dy, ctx.rank), None, None, None


class _ScatterToTP(torch.autograd.Function):
    """Full activations, the same on every rank -> sharded by features.

    x   [..., K]     y  = this rank's part of x        [..., K_r]  no communication
    dy  [..., K_r]   dx = all ranks' dy put together   [..., K]    1 all-gather
    """

    @staticmethod
    def forward(ctx, x, spec, group, tag):
        ctx.spec, ctx.group, ctx.tag = spec, group, tag
        return spec.shard(x, group.rank).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return all_gather_shards(dy, ctx.spec, ctx.group, ctx.tag), None, None, None


class _AllReduceGradients(torch.autograd.Function):
    """Identity on parameters that several ranks hold, each using them for its own heads.

    Backward sums their gradients over the ranks, all of them in one all-reduce, before DDP's or
    FSDP's hooks see them. `specs`: for those whose shards share rows, else None.
    """

    @staticmethod
    def forward(ctx, specs, group, tag, *parameters):
        ctx.specs, ctx.group, ctx.tag = specs, group, tag
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        rank, specs = ctx.group.rank, ctx.specs
        full_grads = [
            grad if spec is None else spec.scatter_add(grad, rank)
            for grad, spec in zip(grads, specs, strict=True)
        ]
        out: list[Tensor | None] = [None] * len(grads)
        # A dtype at a time. Unused parameters take part with zeros, so that every rank sends the
        # same buffer.
        for dtype in dict.fromkeys(grad.dtype for grad in full_grads):
            wanted = [
                i
                for i, grad in enumerate(full_grads)
                if grad.dtype == dtype and ctx.needs_input_grad[3 + i]
            ]
            if not wanted:
                continue
            totals = sum_over_ranks([full_grads[i] for i in wanted], ctx.group, ctx.tag)
            for i, total in zip(wanted, totals, strict=True):
                out[i] = total if specs[i] is None else specs[i].shard(total, rank)
        return None, None, None, *out


def gather_from_tp(x: Tensor, spec: ShardSpec, group: Group, tag: str) -> Tensor:
    """Return the full features of an x that is sharded; see `_GatherFromTP`.

    Collective: every rank of the group must call it.

    Args:
        x: [..., N_r].
        spec: which features each rank has; its dim counts from the end.
        group: the tensor-parallel group.
        tag: name in the collective log.
    """
    return x if group.size == 1 else _GatherFromTP.apply(x, spec, group, tag)


def scatter_to_tp(x: Tensor, spec: ShardSpec, group: Group, tag: str) -> Tensor:
    """Return this rank's features of a full x [..., K]; see `_ScatterToTP` and `gather_from_tp`.

    Collective: every rank of the group must call it, as backward communicates.
    """
    return x if group.size == 1 else _ScatterToTP.apply(x, spec, group, tag)


def all_reduce_gradients(
    parameters: Sequence[Tensor], specs: Sequence[ShardSpec | None], group: Group, tag: str
) -> tuple[Tensor, ...]:
    """Return the parameters, with gradients summed over the ranks; see `_AllReduceGradients`.

    Collective: every rank of the group must call it, as backward communicates.
    """
    return _AllReduceGradients.apply(specs, group, tag, *parameters)
