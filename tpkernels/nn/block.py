"""A pre-norm transformer block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..group import GroupLike, resolve_group
from ..overlap.schedule import Overlap
from .attention import ParallelSelfAttention
from .dropout import Dropout
from .mlp import ParallelMLP
from .norm import LayerNorm, RMSNorm

_NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


class ParallelTransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): two all-reduces forward, two backward.

    The residual additions are part of the row-parallel layers (one pass with their bias), unless
    dropout stands between.

    Shapes: [batch, tokens, hidden_size] -> the same.

    Collective: every rank of the group must call forward and backward.

    Args:
        hidden_size: of the full block.
        num_heads: of the full block.
        ffn_size: of the full block; None means 4 * hidden_size.
        num_kv_heads: of the full block; None means num_heads.
        activation: as ParallelMLP's.
        norm: "layernorm" or "rmsnorm".
        eps: of the norms.
        bias: of all linear layers.
        causal: mask the future, where forward gets no mask.
        dropout: of both branches' outputs, the same mask on every rank and at any TP size.
        attention_dropout: of the attention weights.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.
        overlap: of all linear layers: "auto", False (one chunk) or a number of row chunks.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an unknown norm; as ParallelSelfAttention and ParallelMLP.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> block = ParallelTransformerBlock(72, num_heads=9, norm="rmsnorm", group=mesh["tp"])
        >>> block(torch.ones(2, 5, 72)).shape
        torch.Size([2, 5, 72])
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
        group: GroupLike = None,
        overlap: Overlap = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        if ffn_size is None:
            ffn_size = 4 * hidden_size
        place: dict[str, Any] = dict(device=device, dtype=dtype)
        options: dict[str, Any] = dict(
            bias=bias, group=resolve_group(group), overlap=overlap, **place
        )
        self.attention_norm = _NORMS[norm](hidden_size, eps, **place)
        self.attention = ParallelSelfAttention(
            hidden_size,
            num_heads,
            num_kv_heads,
            causal=causal,
            dropout=attention_dropout,
            **options,
        )
        self.mlp_norm = _NORMS[norm](hidden_size, eps, **place)
        self.mlp = ParallelMLP(hidden_size, ffn_size, activation=activation, **options)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        input: Tensor,
        attn_mask: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Compute the output.

        Args:
            input: [batch, tokens, hidden_size].
            attn_mask: as ParallelSelfAttention's.
            rotary: as ParallelSelfAttention's.
        """
        x = self.attention_norm(input)
        if self.training and self.dropout.p:
            attended = self.dropout(self.attention(x, attn_mask, rotary=rotary))
            normed, stream = self.mlp_norm(attended, input)
            return stream + self.dropout(self.mlp(normed))
        if isinstance(self.mlp_norm, RMSNorm):
            normed, stream = self.attention(
                x, attn_mask, residual=input, rotary=rotary, norm=self.mlp_norm
            )
        else:
            stream = self.attention(x, attn_mask, residual=input, rotary=rotary)
            normed = self.mlp_norm(stream)
        return self.mlp(normed, residual=stream)
