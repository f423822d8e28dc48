"""Self-attention with its heads sharded over the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..group import GroupLike, resolve_group
from ..ops.rotary import rotary as rotate
from ..overlap.schedule import Overlap
from ..sharding.heads import assign_heads
from .column_linear import ColumnParallelLinear
from .norm import RMSNorm
from .row_linear import RowParallelLinear
from .tp_region import TPRegion


class ParallelSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention.

    It has one all-reduce forward and one backward.

    Ranks take whole KV groups, as evenly as they come (9 heads on 2 ranks: 6 and 3 with 3 KV heads,
    5 and 4 with 9). With more ranks than KV heads each rank holds copies of the KV heads that its
    query heads need.

    Shapes: input [batch, tokens, hidden_size], residual the same or None -> the same.

    Collective: every rank of the group must call forward and backward.

    Args:
        hidden_size: of the full layer.
        num_heads: of the full layer.
        num_kv_heads: of the full layer, a divisor of num_heads; None means num_heads.
        bias: of all four projections.
        causal: mask the future, where forward gets no mask.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.
        head_dim: features of a head; None means hidden_size / num_heads.
        dropout: of the attention weights while training; ranks draw for their own heads.
        overlap: of the projections: "auto", False (one chunk) or a number of row chunks.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: head counts that do not fit, more ranks than heads.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> attention = ParallelSelfAttention(72, num_heads=9, num_kv_heads=3, group=mesh["tp"])
        >>> attention(torch.ones(2, 5, 72)).shape
        torch.Size([2, 5, 72])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        bias: bool = True,
        causal: bool = True,
        group: GroupLike = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        overlap: Overlap = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_kv_heads is None:
            num_kv_heads = num_heads
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}: "
                    "pass head_dim"
                )
            head_dim = hidden_size // num_heads
        self.head_dim, self.causal, self.dropout = head_dim, causal, dropout
        group = resolve_group(group)
        self.heads = assign_heads(num_heads, num_kv_heads, group.size)
        q, kv = self.heads.q_spec(head_dim), self.heads.kv_spec(head_dim)
        options: dict[str, Any] = dict(group=group, overlap=overlap, device=device, dtype=dtype)
        self.q_proj = ColumnParallelLinear(hidden_size, q.size, bias, out_spec=q, **options)
        self.k_proj = ColumnParallelLinear(hidden_size, kv.size, bias, out_spec=kv, **options)
        self.v_proj = ColumnParallelLinear(hidden_size, kv.size, bias, out_spec=kv, **options)
        self.o_proj = RowParallelLinear(q.size, hidden_size, bias, in_spec=q.along(1), **options)
        grad_summed = []
        if kv.has_shared_rows:
            for layer in (self.k_proj, self.v_proj):
                grad_summed += [(layer, name) for name in layer.shard_specs]
        columns = [self.q_proj, self.k_proj, self.v_proj]
        self.region = TPRegion(self, columns, self.o_proj, grad_summed, group)

    def forward(
        self,
        input: Tensor,
        attn_mask: Tensor | None = None,
        residual: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        norm: RMSNorm | None = None,
    ):
        """Compute the output.

        Args:
            input: [batch, tokens, hidden_size].
            attn_mask: as scaled_dot_product_attention's, broadcast over this rank's heads.
            residual: [batch, tokens, hidden_size], added to the output.
            rotary: (cos, sin) of `tpkernels.functional.rotary_tables` for these tokens, for the
                rotary embedding of queries and keys.
            norm: as RowParallelLinear's.

        Returns:
            As RowParallelLinear's forward.
        """

        def heads_of(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)

        q = heads_of(self.q_proj(input))
        k = heads_of(self.k_proj(input))
        v = heads_of(self.v_proj(input))
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
