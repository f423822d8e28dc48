"""Self-attention with its heads split over the ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..group import resolve_group
from ..ops.rotary import rotary as rotate
from ..shard import split_heads
from .linear import ColumnParallelLinear, RowParallelLinear
from .norm import RMSNorm
from .region import SplitRegion


class ParallelSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention: one all-reduce forward, one backward.

    Ranks take whole KV groups, as evenly as they come (9 heads on 2 ranks: 6 and 3 with 3 KV heads, 5 and 4 with 9). With more
    ranks than KV heads each rank holds copies of the KV heads that its query heads need.

    Args:
        hidden_size, num_heads, num_kv_heads: of the whole layer; num_kv_heads divides num_heads, None means num_heads.
        head_dim: None means hidden_size / num_heads.
        causal: mask the future, where forward gets no mask.
        dropout: of the attention weights while training; ranks draw for their own heads.

    Shapes: input [batch, tokens, hidden_size], residual the same or None -> the same.

    Raises:
        ValueError: head counts that do not fit, more ranks than heads.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        bias: bool = True,
        causal: bool = True,
        group=None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        overlap="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        num_kv_heads = num_kv_heads if num_kv_heads is not None else num_heads
        if head_dim is None and hidden_size % num_heads:
            raise ValueError(
                f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}: pass head_dim"
            )
        self.head_dim = head_dim if head_dim is not None else hidden_size // num_heads
        self.causal, self.dropout = causal, dropout
        group = resolve_group(group)
        self.heads = split_heads(num_heads, num_kv_heads, group.size)
        q, kv = self.heads.q_split(self.head_dim), self.heads.kv_split(self.head_dim)
        options = dict(group=group, overlap=overlap, device=device, dtype=dtype)
        self.q_proj = ColumnParallelLinear(hidden_size, q.size, bias, out_split=q, **options)
        self.k_proj = ColumnParallelLinear(hidden_size, kv.size, bias, out_split=kv, **options)
        self.v_proj = ColumnParallelLinear(hidden_size, kv.size, bias, out_split=kv, **options)
        self.o_proj = RowParallelLinear(
            q.size, hidden_size, bias, in_split=self.heads.q_split(self.head_dim, dim=1), **options
        )
        shared = (self.k_proj, self.v_proj) if kv.overlaps else ()
        summed = [(layer, name) for layer in shared for name in layer.splits]
        self.region = SplitRegion(
            self, [self.q_proj, self.k_proj, self.v_proj], self.o_proj, summed, group
        )

    def forward(
        self,
        input: Tensor,
        attn_mask: Tensor | None = None,
        residual: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        norm: RMSNorm | None = None,
    ):
        """`attn_mask`: as scaled_dot_product_attention's, broadcast over this rank's heads. `rotary`: the (cos, sin) of
        `tpkernels.functional.rotary_tables` for these tokens, for rotary embedding of the queries and keys. `norm`: as
        RowParallelLinear's."""

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

        q, k, v = heads(self.q_proj(input)), heads(self.k_proj(input)), heads(self.v_proj(input))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and attn_mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.o_proj(y.transpose(1, 2).flatten(2), residual, norm)
