"""Drop-in parallel layers."""

from .attention import ParallelSelfAttention
from .block import ParallelTransformerBlock
from .embedding import VocabParallelEmbedding
from .linear import ColumnParallelLinear, RowParallelLinear
from .mlp import ParallelMLP

__all__ = [
    "ColumnParallelLinear",
    "ParallelMLP",
    "ParallelSelfAttention",
    "ParallelTransformerBlock",
    "RowParallelLinear",
    "VocabParallelEmbedding",
]
