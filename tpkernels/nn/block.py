"""A pre-norm transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from ..group import resolve_group
from .attention import ParallelSelfAttention
from .mlp import ParallelMLP


class ParallelTransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): two all-reduces forward, two backward.

    The residual additions are part of the row-parallel layers (one pass with their bias), unless dropout stands between.

    Args:
        hidden_size, num_heads, ffn_size, num_kv_heads: of the whole block; ffn_size None means 4 * hidden_size.
        norm: "layernorm" or "rmsnorm".
        dropout: of both branches' outputs, the same mask on every rank; attention_dropout: of the attention weights.

    Shapes: [batch, tokens, hidden_size] -> the same.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        ffn_size: int | None = None,
        num_kv_heads: int | None = None,
        *,
        activation: str = "gelu",
        norm: str = "layernorm",
        eps: float = 1e-5,
        bias: bool = True,
        causal: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        group=None,
        overlap="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        norms = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
        if norm not in norms:
            raise ValueError(f"norm must be one of {', '.join(norms)}, got {norm!r}")
        place = dict(device=device, dtype=dtype)
        options = dict(bias=bias, group=resolve_group(group), overlap=overlap, **place)
        self.attention_norm = norms[norm](hidden_size, eps, **place)
        self.attention = ParallelSelfAttention(hidden_size, num_heads, num_kv_heads, causal=causal, dropout=attention_dropout, **options)
        self.mlp_norm = norms[norm](hidden_size, eps, **place)
        self.mlp = ParallelMLP(hidden_size, ffn_size if ffn_size is not None else 4 * hidden_size, activation=activation, **options)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if self.training and self.dropout.p:
            x = input + self.dropout(self.attention(self.attention_norm(input), attn_mask))
            return x + self.dropout(self.mlp(self.mlp_norm(x)))
        x = self.attention(self.attention_norm(input), attn_mask, residual=input)
        return self.mlp(self.mlp_norm(x), residual=x)
