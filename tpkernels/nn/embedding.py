"""VocabParallelEmbedding: an embedding sharded by vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..group import Group, GroupLike, resolve_group
from ..ops.embedding import check_padding_idx, vocab_parallel_embedding
from ..sharding.module import ShardedModule
from ..sharding.spec import ShardSpec


class VocabParallelEmbedding(ShardedModule, nn.Embedding):
    """nn.Embedding whose rows are sharded in torch.chunk's sizes: one all-reduce forward.

    Shapes: ids [...] -> [..., embedding_dim], full on every rank.

    Collective: every rank of the group must call forward.

    Args:
        num_embeddings: rows of the full weight, any number.
        embedding_dim: features.
        padding_idx: as nn.Embedding's.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.
        device: of the weight.
        dtype: of the weight.

    Raises:
        ValueError: a padding_idx outside the vocabulary.
        IndexError: forward got an id outside the vocabulary.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> VocabParallelEmbedding(331, 16, group=mesh["tp"])(torch.tensor([[0, 330]])).shape
        torch.Size([1, 2, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group: GroupLike = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self._init_embedding(num_embeddings, embedding_dim, padding_idx, resolve_group(group))
        spec = ShardSpec.chunks(num_embeddings, self.group.size)
        self.register_empty_shard("weight", (num_embeddings, embedding_dim), spec, device, dtype)
        self.reset_parameters()

    def _init_embedding(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, group: Group
    ) -> None:
        nn.Module.__init__(self)
        self._init_sharded(group)
        if padding_idx is not None:
            padding_idx = check_padding_idx(padding_idx, num_embeddings)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, *, group: GroupLike = None
    ) -> VocabParallelEmbedding:
        """Shard an nn.Embedding that is the same on every rank; `embedding` stays as it is.

        A subclass with a forward of its own (Gemma 3's scaled embedding) keeps it, around the
        sharded lookup.

        Raises:
            TypeError: it is no nn.Embedding.
            ValueError: it has options that cannot be sharded.
        """
        check_embedding(embedding)
        stock: Any = type(embedding)
        kind: Any = cls
        if stock is not nn.Embedding:
            kind = type(f"{cls.__name__}Of{stock.__name__}", (stock, cls), {})
        new = kind.__new__(kind)
        cls._init_embedding(
            new,
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            resolve_group(group),
        )
        for name, value in vars(embedding).items():  # what the subclass added
            if name not in vars(new):
                setattr(new, name, value)
        for name, buffer in embedding._buffers.items():
            is_persistent = name not in embedding._non_persistent_buffers_set
            new.register_buffer(name, buffer, persistent=is_persistent)
        new.training = embedding.training
        spec = ShardSpec.chunks(embedding.num_embeddings, new.group.size)
        new.register_shard("weight", embedding.weight, spec)
        return new

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as nn.Embedding: for one seed the same full weight at any TP size."""
        stock = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        self.copy_from_full("weight", stock.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows `input` of the full weight."""
        weight = self.local_tensor("weight")
        assert weight is not None
        return vocab_parallel_embedding(
            input,
            weight,
            self.num_embeddings,
            group=self.group,
            padding_idx=self.padding_idx,
        )


def check_embedding(embedding: nn.Module) -> None:
    """Raise unless it is an nn.Embedding that can be sharded by vocabulary."""
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(embedding, option):
            raise ValueError(
                f"an nn.Embedding with {option}={getattr(embedding, option)!r} cannot be sharded: "
                "set it to its default"
            )
