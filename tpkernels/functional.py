"""The parallel layers as functions of this rank's shards."""

from .ops.activation import bias_act
from .ops.cross_entropy import vocab_parallel_cross_entropy
from .ops.embedding import vocab_parallel_embedding
from .ops.linear import column_parallel_linear, row_parallel_linear

__all__ = ["bias_act", "column_parallel_linear", "row_parallel_linear", "vocab_parallel_cross_entropy", "vocab_parallel_embedding"]
