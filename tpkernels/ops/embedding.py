"""Lookup in an embedding whose vocabulary is sharded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..group import GroupLike, resolve_group
from ..sharding.spec import chunk_sizes
from .checks import check_in_range
from .collective_log import log_fake
from .fake import register_fake
from .once import once_differentiable

_ops = torch.ops.tpkernels


@register_fake("vocab_embedding")
def _(ids, weight, vocab_start_index, group, tag):
    out = weight.new_empty(*ids.shape, weight.shape[1])
    log_fake("all_reduce", tag, group, out)
    return out


class _VocabEmbedding(torch.autograd.Function):
    """Rows of a weight that is sharded by vocabulary.

    ids [...]      the same on every rank
    w   [V_r, H]   rows vocab_start_index .. vocab_start_index + V_r of the full weight
    y   [..., H]   = sum over ranks of (the row of each id that this rank holds, else 0)
                   1 all-reduce
    dw  [V_r, H]   = dy summed by id      no communication
    """

    @staticmethod
    def forward(ctx, ids, weight, vocab_start_index, padding_idx, group, tag):
        ctx.save_for_backward(ids)
        ctx.vocab_start_index, ctx.padding_idx = vocab_start_index, padding_idx
        ctx.num_rows = weight.shape[0]
        return _ops.vocab_embedding(ids, weight, vocab_start_index, group.name, tag)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        ids, dy = ids.flatten(), dy.reshape(-1, dy.shape[-1])
        row = ids - ctx.vocab_start_index
        if ctx.padding_idx is not None:
            row = row.masked_fill(ids == ctx.padding_idx, -1)
        # Rows of other ranks go to one spare row: no shape depends on the data, so that this can
        # be captured in a CUDA graph.
        row = torch.where((row >= 0) & (row < ctx.num_rows), row, ctx.num_rows)
        dw = dy.new_zeros(ctx.num_rows + 1, dy.shape[-1])
        return None, dw.index_add_(0, row, dy)[: ctx.num_rows], None, None, None, None


def vocab_parallel_embedding(
    ids: Tensor,
    weight: Tensor,
    num_embeddings: int,
    *,
    group: GroupLike = None,
    padding_idx: int | None = None,
    tag: str = "embedding",
) -> Tensor:
    """Return rows `ids` of a weight whose rows are sharded in torch.chunk's sizes.

    Collective: every rank of the group must call it.

    Args:
        ids: [...] integers, the same on every rank.
        weight: [V_r, H], this rank's rows.
        num_embeddings: V, rows of the full weight.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.
        padding_idx: a row that gets no gradient; negative ones count from the end.
        tag: name in the collective log.

    Returns:
        [*ids.shape, H], full on every rank.

    Raises:
        IndexError: an id outside the vocabulary, before any communication (on a GPU an assertion
            on the device).
        TypeError: ids that are not integers.
        ValueError: a weight of another size, a padding_idx outside the vocabulary.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> ids = torch.tensor([0, 3])
        >>> vocab_parallel_embedding(ids, torch.ones(4, 2), 4, group=mesh["tp"]).shape
        torch.Size([2, 2])
    """
    group = resolve_group(group)
    sizes = chunk_sizes(num_embeddings, group.size)
    if weight.shape[0] != sizes[group.rank]:
        raise ValueError(
            f"weight has {weight.shape[0]} rows on rank {group.rank}, "
            f"but num_embeddings={num_embeddings} over {group.size} ranks is {sizes}"
        )
    check_in_range("ids", ids, num_embeddings, "a vocabulary of that size")
    if padding_idx is not None:
        padding_idx = check_padding_idx(padding_idx, num_embeddings)
    vocab_start_index = sum(sizes[: group.rank])
    return _VocabEmbedding.apply(ids, weight, vocab_start_index, padding_idx, group, tag)


def check_padding_idx(padding_idx: int, num_embeddings: int) -> int:
    """Return a padding_idx that counts from the start; raise ValueError if it is outside."""
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx={padding_idx} is outside a vocabulary of {num_embeddings}")
    return padding_idx % num_embeddings
