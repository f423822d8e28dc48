"""An embedding table split by vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..group import Group, resolve_group
from ..ops.embedding import vocab_parallel_embedding
from ..shard import Split
from .sharded import Sharded


class VocabParallelEmbedding(Sharded, nn.Embedding):
    """nn.Embedding whose rows are split over the ranks (in torch.chunk's sizes, any vocabulary): one all-reduce forward.

    Args:
        num_embeddings, embedding_dim, padding_idx: as nn.Embedding's, of the whole table.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.

    Shapes: ids [...] -> [..., embedding_dim], whole on every rank. Raises IndexError for an id outside the vocabulary.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        group=None,
        device=None,
        dtype=None,
    ):
        self._setup(num_embeddings, embedding_dim, padding_idx, resolve_group(group))
        self.put_empty(
            "weight",
            (num_embeddings, embedding_dim),
            Split.chunks(num_embeddings, self.group.size),
            device,
            dtype,
        )
        self.reset_parameters()

    def _setup(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, group: Group
    ) -> None:
        nn.Module.__init__(self)
        self._init_sharded(group)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(
                f"padding_idx={padding_idx} is outside a vocabulary of {num_embeddings}"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx % num_embeddings if padding_idx is not None else None
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = (
            None,
            2.0,
            False,
            False,
        )

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, *, group=None) -> VocabParallelEmbedding:
        """This rank's rows of an nn.Embedding that is the same on every rank; `embedding` is left as it is.

        A subclass with a forward of its own (Gemma 3's scaled embedding) keeps it, around the split lookup.
        """
        check_embedding(embedding)
        stock = type(embedding)
        kind = (
            cls
            if stock is nn.Embedding
            else type(f"{cls.__name__}Of{stock.__name__}", (stock, cls), {})
        )
        new = kind.__new__(kind)
        cls._setup(
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
            new.register_buffer(
                name, buffer, persistent=name not in embedding._non_persistent_buffers_set
            )
        new.training = embedding.training
        new.put("weight", embedding.weight, Split.chunks(embedding.num_embeddings, new.group.size))
        return new

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """nn.Embedding's initialisation: for one seed the same full table at any TP size."""
        like = self.weight
        stock = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            device=like.device,
            dtype=like.dtype,
        )
        self.fill("weight", stock.weight)

    def forward(self, input: Tensor) -> Tensor:
        return vocab_parallel_embedding(
            input,
            self.local("weight"),
            self.num_embeddings,
            group=self.group,
            padding_idx=self.padding_idx,
        )


def check_embedding(embedding: nn.Module) -> None:
    """Raises unless it is an nn.Embedding that can be split by vocabulary."""
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"embedding must be an nn.Embedding, got {type(embedding).__name__}")
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(embedding, option):
            raise ValueError(
                f"an nn.Embedding with {option}={getattr(embedding, option)!r} cannot be split: set it to its default"
            )
