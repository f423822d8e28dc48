"""Drop-in parallel layers."""

from .attention import ParallelSelfAttention
from .block import ParallelTransformerBlock
from .dropout import Dropout
from .embedding import VocabParallelEmbedding
from .linear import ColumnParallelLinear, RowParallelLinear
from .mlp import ParallelMLP
from .norm import LayerNorm, RMSNorm

__all__ = [
    "ColumnParallelLinear",
    "Dropout",
    "LayerNorm",
    "ParallelMLP",
    "ParallelSelfAttention",
    "ParallelTransformerBlock",
    "RMSNorm",
    "RowParallelLinear",
    "VocabParallelEmbedding",
]
