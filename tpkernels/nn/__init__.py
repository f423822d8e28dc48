"""Drop-in parallel layers."""

from .attention import ParallelSelfAttention
from .block import ParallelTransformerBlock
from .column_linear import ColumnParallelLinear
from .dropout import Dropout
from .embedding import VocabParallelEmbedding
from .mlp import ParallelMLP
from .norm import LayerNorm, RMSNorm
from .row_linear import RowParallelLinear

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
