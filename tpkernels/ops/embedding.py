"""An embedding table split by vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..group import resolve_group
from ..shard import chunk_sizes
from .comm import _log_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels


@torch.library.register_fake("tpkernels::vocab_embedding")
def _(ids, weight, first, group, tag):
    out = weight.new_empty(*ids.shape, weight.shape[1])
    _log_fake("all_reduce", tag, group, out)
    return out


class _VocabEmbedding(torch.autograd.Function):
    """ids [...], the same on every rank; weight [V_r, H], rows first .. first + V_r of the table.

    y   [..., H]   = sum over ranks of (the row of each id that this rank holds, else 0)   one all-reduce
    dw  [V_r, H]   = dy added up by id                                                  no communication
    """

    @staticmethod
    def forward(ctx, ids, weight, first, padding_idx, group, tag):
        ctx.save_for_backward(ids)
        ctx.first, ctx.padding_idx, ctx.rows = first, padding_idx, weight.shape[0]
        return _ops.vocab_embedding(ids, weight, first, group.name, tag)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        local, dy = ids.flatten() - ctx.first, dy.reshape(-1, dy.shape[-1])
        if ctx.padding_idx is not None:
            local = local.masked_fill(ids.flatten() == ctx.padding_idx, -1)
        # Rows of other ranks go to one spare row: no data-dependent shape, so it can be captured in a CUDA graph.
        local = torch.where((local >= 0) & (local < ctx.rows), local, ctx.rows)
        dw = dy.new_zeros(ctx.rows + 1, dy.shape[-1])
        return None, dw.index_add_(0, local, dy)[: ctx.rows], None, None, None, None


def check_integers(name: str, values: Tensor) -> None:
    """What index_select and gather take; raised here because a rank with no rows does not come to them."""
    if values.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {values.dtype}")


def check_in_range(name: str, values: Tensor, size: int, what: str) -> None:
    """Raises IndexError unless all of `values` are in [0, size); on a GPU asserts on the device, so that nothing is synchronised."""
    check_integers(name, values)
    if not values.numel():
        return
    if values.device.type == "cuda":
        torch._assert_async(
            ((values >= 0) & (values < size)).all(), f"{name} outside [0, {size}), {what}"
        )
    elif values.device.type == "cpu" and not torch._subclasses.fake_tensor.is_fake(values):
        low, high = (v.item() for v in values.aminmax())
        if low < 0 or high >= size:
            raise IndexError(
                f"{name} has values from {low} to {high}, but {what} takes 0 to {size - 1}"
            )


def vocab_parallel_embedding(
    ids: Tensor,
    weight: Tensor,
    num_embeddings: int,
    *,
    group=None,
    padding_idx: int | None = None,
    tag: str = "embedding",
) -> Tensor:
    """Rows `ids` of a table whose rows are split over the ranks in torch.chunk's sizes: [*ids.shape, H], whole on every rank.

    Args:
        ids: integers, the same on every rank.
        weight: [V_r, H], this rank's rows.
        num_embeddings: V.
        padding_idx: a row that gets no gradient; negative ones count from the end.

    Raises:
        IndexError: an id outside the vocabulary (on a GPU a device-side assertion), before any communication.
        TypeError: ids that are not integers.
    """
    group = resolve_group(group)
    size, sizes = num_embeddings, chunk_sizes(num_embeddings, group.size)
    if weight.shape[0] != sizes[group.rank]:
        raise ValueError(
            f"weight has {weight.shape[0]} rows on rank {group.rank}, but num_embeddings={size} over {group.size} ranks is {sizes}"
        )
    check_in_range("ids", ids, size, "a vocabulary of that size")
    if padding_idx is not None:
        if not -size <= padding_idx < size:
            raise ValueError(f"padding_idx={padding_idx} is outside a vocabulary of {size}")
        padding_idx %= size
    return _VocabEmbedding.apply(ids, weight, sum(sizes[: group.rank]), padding_idx, group, tag)
