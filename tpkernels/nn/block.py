"""A pre-norm transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from ..group import resolve_group
from .attention import ParallelSelfAttention
from .dropout import Dropout
from .mlp import ParallelMLP
from .norm import LayerNorm, RMSNorm


class ParallelTransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): two all-reduces forward, two backward.

    The residual additions are part of the row-parallel layers (one pass with their bias), unless dropout stands between.

    Args:
        hidden_size, num_heads, ffn_size, num_kv_heads: of the whole block; ffn_size None means 4 * hidden_size.
        norm: "layernorm" or "rmsnorm".
        dropout: of both branches' outputs, the same mask on every rank and at any TP size; attention_dropout: of the attention weights.

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
        norms = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
        if norm not in norms:
            raise ValueError(f"norm must be one of {', '.join(norms)}, got {norm!r}")
        place = dict(device=device, dtype=dtype)
        options = dict(bias=bias, group=resolve_group(group), overlap=overlap, **place)
        self.attention_norm = norms[norm](hidden_size, eps, **place)
        self.attention = ParallelSelfAttention(
            hidden_size,
            num_heads,
            num_kv_heads,
            causal=causal,
            dropout=attention_dropout,
            **options,
        )
        self.mlp_norm = norms[norm](hidden_size, eps, **place)
        self.mlp = ParallelMLP(
            hidden_size,
            ffn_size if ffn_size is not None else 4 * hidden_size,
            activation=activation,
            **options,
        )
        self.dropout = Dropout(dropout)

    def forward(
        self,
        input: Tensor,
        attn_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`attn_mask`, `rotary`: as ParallelSelfAttention's."""
        x = self.attention_norm(input)
        if self.training and self.dropout.p:
            x, stream = self.mlp_norm(
                self.dropout(self.attention(x, attn_mask, rotary=rotary)), input
            )
            return stream + self.dropout(self.mlp(x))
        if isinstance(self.mlp_norm, RMSNorm):
            normed, x = self.attention(
                x, attn_mask, residual=input, rotary=rotary, norm=self.mlp_norm
            )
        else:
            x = self.attention(x, attn_mask, residual=input, rotary=rotary)
            normed = self.mlp_norm(x)
        return self.mlp(normed, residual=x)
