"""The parallel layers as functions of this rank's shards, and the fused kernels beside them."""

from .ops.activation import bias_act, gated_act
from .ops.column_linear import column_parallel_linear
from .ops.cross_entropy import vocab_parallel_cross_entropy
from .ops.dropout import dropout
from .ops.embedding import vocab_parallel_embedding
from .ops.linear_cross_entropy import vocab_parallel_linear_cross_entropy
from .ops.norm import layer_norm, rms_norm
from .ops.rotary import rotary, rotary_tables
from .ops.row_linear import row_parallel_linear

__all__ = [
    "bias_act",
    "column_parallel_linear",
    "dropout",
    "gated_act",
    "layer_norm",
    "rms_norm",
    "rotary",
    "rotary_tables",
    "row_parallel_linear",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "vocab_parallel_linear_cross_entropy",
]
