"""The unsharded modules, of plain PyTorch layers, that every contender holds its shard of.

They are seeded: the same on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, HEADS = 1024, 16


class MLP(nn.Module):
    """Computes fc2(gelu(fc1(x)))."""

    def __init__(self, fc1: nn.Module, fc2: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm causal transformer block of [batch, tokens, hidden].

    Args:
        norms: before attention and before the MLP.
        qkv: q, k and v in one layer, [hidden -> 3 * heads * head size].
        out: the output projection of attention.
        mlp: the MLP.
        heads: attention heads in `qkv`: this rank's where it is sharded.
    """

    def __init__(
        self,
        norms: tuple[nn.Module, nn.Module],
        qkv: nn.Module,
        out: nn.Module,
        mlp: nn.Module,
        heads: int,
    ):
        super().__init__()
        self.norm1, self.norm2 = norms
        self.qkv, self.out, self.mlp, self.heads = qkv, out, mlp, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def make(kind: str, hidden: int, dtype: torch.dtype, device: str) -> nn.Module:
    """Returns a seeded module: row ([4 * hidden -> hidden]), column (its mirror), mlp or block."""
    torch.manual_seed(0)
    place: dict[str, Any] = dict(device=device, dtype=dtype)
    ffn = 4 * hidden
    if kind == "row":
        return nn.Linear(ffn, hidden, **place)
    if kind == "column":
        return nn.Linear(hidden, ffn, **place)
    if kind == "mlp":
        return MLP(nn.Linear(hidden, ffn, **place), nn.Linear(ffn, hidden, **place))
    norms = nn.LayerNorm(hidden, **place), nn.LayerNorm(hidden, **place)
    qkv = nn.Linear(hidden, 3 * hidden, **place)
    out = nn.Linear(hidden, hidden, **place)
    mlp = MLP(nn.Linear(hidden, ffn, **place), nn.Linear(ffn, hidden, **place))
    return Block(norms, qkv, out, mlp, heads(hidden))


def heads(hidden: int) -> int:
    return max(4, hidden * HEADS // HIDDEN)


def by_rank(qkv: nn.Linear, size: int) -> nn.Linear:
    """Returns the fused q, k, v layer with its rows reordered by rank.

    An even shard of the result holds the q, k and v of that rank's own heads.
    """
    place: dict[str, Any] = dict(device=qkv.weight.device, dtype=qkv.weight.dtype)
    new = nn.Linear(qkv.in_features, qkv.out_features, **place)
    with torch.no_grad():
        for to, source in zip(new.parameters(), qkv.parameters(), strict=True):
            q, k, v = (part.chunk(size) for part in source.chunk(3))
            to.copy_(torch.cat([part for rank in zip(q, k, v, strict=True) for part in rank]))
    return new
