"""The unsplit modules that every contender holds its share of, seeded: the same on every rank. Linear layers of plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN, FFN, HEADS = 1024, 4096, 16


class MLP(nn.Module):
    """fc2(gelu(fc1(x)))"""

    def __init__(self, fc1: nn.Module, fc2: nn.Module):
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block of [batch, tokens, hidden], causal; q, k and v by one layer, `heads` of them here."""

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


def make(what: str, hidden: int, dtype: torch.dtype, device: str) -> nn.Module:
    """`what`: row ([ffn -> hidden]), column ([hidden -> ffn]), mlp or block."""
    torch.manual_seed(0)
    ffn, place = 4 * hidden, dict(device=device, dtype=dtype)

    def mlp() -> MLP:
        return MLP(nn.Linear(hidden, ffn, **place), nn.Linear(ffn, hidden, **place))

    if what == "row":
        return nn.Linear(ffn, hidden, **place)
    if what == "column":
        return nn.Linear(hidden, ffn, **place)
    if what == "mlp":
        return mlp()
    norms = nn.LayerNorm(hidden, **place), nn.LayerNorm(hidden, **place)
    return Block(
        norms,
        nn.Linear(hidden, 3 * hidden, **place),
        nn.Linear(hidden, hidden, **place),
        mlp(),
        heads(hidden),
    )


def heads(hidden: int) -> int:
    return max(4, hidden * HEADS // HIDDEN)


def by_rank(qkv: nn.Linear, size: int) -> nn.Linear:
    """The fused layer with its rows in such an order that an even split gives each rank its own heads' q, k and v."""
    new = nn.Linear(
        qkv.in_features, qkv.out_features, device=qkv.weight.device, dtype=qkv.weight.dtype
    )
    with torch.no_grad():
        for to, source in zip(new.parameters(), qkv.parameters(), strict=True):
            q, k, v = (part.chunk(size) for part in source.chunk(3))
            to.copy_(torch.cat([part for rank in zip(q, k, v, strict=True) for part in rank]))
    return new
