"""Collectives: the public all-reduce, the log of what was sent, and the Functions that move activations between layouts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling
from torch.distributed import ProcessGroup

from .. import _C
from ..group import Group, resolve_group
from ..shard import Split
from .once import once_differentiable

_ops = torch.ops.tpkernels


class Collective(NamedTuple):
    """One entry of the log. `bytes`: of the reduced buffer, or of the gathered result; `chunk` of `chunks` counts from 0."""

    op: str
    tag: str
    group: str
    bytes: int
    chunk: int
    chunks: int


@contextmanager
def log_collectives() -> Iterator[list[Collective]]:
    """Collects the collectives that tpkernels starts on this process, on any thread; the list fills when the block ends.

    Also under FakeTensorMode, where nothing is sent. (CommDebugMode does not see collectives made in C++.)
    """
    entries: list[Collective] = []
    _C.log_start()
    try:
        yield entries
    finally:
        entries.extend(Collective(*row) for row in _C.log_stop())


def _log_fake(op: str, tag: str, group: str, buffer: Tensor, chunks: int = 0) -> None:
    """What the real op writes for `buffer`: a line, or with `chunks` one for each chunk of its rows."""
    if (
        not _C.log_enabled()
    ):  # sizes are symbols where dynamic shapes are traced: nothing below is asked of them then
        return
    if not chunks:
        _log_fake_chunk(op, tag, group, buffer, 0, 1)
    elif buffer.numel():
        rows = buffer.numel() // buffer.shape[-1]
        bounds = _C.chunk_bounds(rows, chunks, buffer.shape[-1] * buffer.itemsize)
        for i, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            _log_fake_chunk(op, tag, group, buffer.view(rows, -1)[begin:end], i, len(bounds) - 1)


def _log_fake_chunk(op: str, tag: str, group: str, buffer: Tensor, chunk: int, chunks: int) -> None:
    """What the real op writes for `buffer`, one of `chunks`: nothing if it is empty or the group's only rank's."""
    if (
        _C.log_enabled()
        and buffer.numel()
        and dist.distributed_c10d._resolve_process_group(group).size() > 1
    ):
        _C.log_write(op, tag, group, buffer.numel() * buffer.itemsize, chunk, chunks)


@torch.library.register_fake("tpkernels::all_reduce_")
def _(self, group, op, tag):
    _log_fake("all_reduce", tag, group, self)


@torch.library.register_fake("tpkernels::all_gather")
def _(self, group, tag):
    out = self.new_empty(dist.distributed_c10d._resolve_process_group(group).size(), *self.shape)
    _log_fake("all_gather", tag, group, out)
    return out


@torch.library.register_fake("tpkernels::empty_comm_buffer")
def _(like, size):
    return like.new_empty(size)


def all_reduce_(tensor: Tensor, group) -> Tensor:
    """Sums `tensor` over the ranks of `group`, in place, and returns it. Not differentiable.

    Args:
        tensor: of one shape and dtype on every rank; float32, bfloat16, float16, float64, int32 or int64.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.
    """
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "tensor requires grad, and all_reduce_ is not differentiable: pass tensor.detach(), or call it under torch.no_grad()"
        )
    name = group.group_name if isinstance(group, ProcessGroup) else resolve_group(group).name
    if type(tensor) is Tensor and not torch._C._len_torch_dispatch_stack() and not is_compiling():
        _C.all_reduce_(tensor, name)  # a small message's time is mostly the dispatcher's
    else:
        _ops.all_reduce_(tensor, name, "sum", "all_reduce")
        torch.autograd.graph.increment_version(
            tensor
        )  # so that autograd notices where it had been saved
    return tensor


def sum_over_ranks(parts: Sequence[Tensor], group: Group, tag: str) -> list[Tensor]:
    """Sums tensors of one dtype over the ranks in one all-reduce."""
    flat = _ops.empty_comm_buffer(parts[0], [sum(p.numel() for p in parts)])
    torch.cat([p.reshape(-1) for p in parts], out=flat)
    _ops.all_reduce_(flat, group.name, "sum", tag)
    # Clones: a gradient that is a view at an offset, wrapped in a DTensor, cannot be deep-copied.
    return [
        s.view(p.shape).clone()
        for s, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
    ]


def all_gather_shards(shard: Tensor, split: Split, group: Group, tag: str) -> Tensor:
    """Every rank's `shard` put together along `split.dim`."""
    shape = list(shard.shape)
    shape[split.dim] = split.stored_size
    mine = _ops.empty_comm_buffer(shard, shape)
    mine.narrow(split.dim, 0, shard.size(split.dim)).copy_(shard)
    return split.unshard(_ops.all_gather(mine, group.name, tag).unbind(0))


class _Gather(torch.autograd.Function):
    """[..., N_r] on every rank -> [..., N] on all of them; dy [..., N], the same on all of them -> this rank's slice."""

    @staticmethod
    def forward(ctx, x, split, group, tag):
        ctx.split, ctx.rank = split, group.rank
        return all_gather_shards(x, split, group, tag)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return ctx.split.shard(dy, ctx.rank), None, None, None


class _Scatter(torch.autograd.Function):
    """x [..., K], the same on all ranks -> this rank's [..., K_r]; dy [..., K_r] -> [..., K] put together from all of them."""

    @staticmethod
    def forward(ctx, x, split, group, tag):
        ctx.split, ctx.group, ctx.tag = split, group, tag
        return split.shard(x, group.rank).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return all_gather_shards(dy, ctx.split, ctx.group, ctx.tag), None, None, None


class _SumGradients(torch.autograd.Function):
    """Identity on parameters that several ranks hold, each using them for its own heads; backward sums their gradients over the
    ranks, all of them in one all-reduce, before DDP's or FSDP's hooks see them. `splits`: of those whose shards overlap, else None."""

    @staticmethod
    def forward(ctx, splits, group, tag, *parameters):
        ctx.splits, ctx.group, ctx.tag = splits, group, tag
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grads = [
            g if split is None else split.add_up(g, ctx.group.rank)
            for g, split in zip(grads, ctx.splits, strict=True)
        ]
        out: list[Tensor | None] = [None] * len(grads)
        # A dtype at a time; unused parameters take part with zeros, so that every rank sends the same buffer.
        for dtype in dict.fromkeys(g.dtype for g in grads):
            mine = [
                i for i, g in enumerate(grads) if g.dtype == dtype and ctx.needs_input_grad[3 + i]
            ]
            if mine:
                for i, total in zip(
                    mine, sum_over_ranks([grads[i] for i in mine], ctx.group, ctx.tag), strict=True
                ):
                    out[i] = (
                        total
                        if ctx.splits[i] is None
                        else ctx.splits[i].shard(total, ctx.group.rank)
                    )
        return None, None, None, *out


def gather(x: Tensor, split: Split, group: Group, tag: str) -> Tensor:
    """See `_Gather`. `split.dim` counts from the end."""
    return x if group.size == 1 else _Gather.apply(x, split, group, tag)


def scatter(x: Tensor, split: Split, group: Group, tag: str) -> Tensor:
    """See `_Scatter`. `split.dim` counts from the end."""
    return x if group.size == 1 else _Scatter.apply(x, split, group, tag)


def sum_gradients(
    parameters: Sequence[Tensor], splits: Sequence[Split | None], group: Group, tag: str
) -> tuple[Tensor, ...]:
    """See `_SumGradients`."""
    return _SumGradients.apply(splits, group, tag, *parameters)
