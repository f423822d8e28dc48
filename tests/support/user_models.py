"""Models that a user wrote, for `tpk.parallelize`, and pairs of an unsharded and a sharded one."""

import copy

import families
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import tpkernels as tpk


def llama_pair(dtensor=True, **changes):
    stock = families.make("llama", **changes)
    return stock, tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=dtensor)


class Lora(nn.Module):
    """A low-rank update around a column layer, of its own output features."""

    def __init__(self, base, width, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = base
        self.down = nn.Parameter(torch.randn(4, 72, generator=generator) * 0.1, requires_grad=False)
        self.up = nn.Parameter(
            torch.randn(width, 4, generator=generator) * 0.1, requires_grad=False
        )

    def forward(self, x):
        return self.base(x * 1.0) + F.linear(F.linear(x.detach(), self.down), self.up)


class Attention(nn.Module):
    """Attention as a user writes it, with names of its own.

    Keys and values come from another input if there is one.
    """

    def __init__(self, skip=False):
        super().__init__()
        self.num_heads, self.head_dim, self.skip = 9, 8, skip
        self.wq, self.wk, self.wv, self.extra = (
            nn.Linear(72, 72, bias=b) for b in (True, False, True, False)
        )
        self.wo = nn.Linear(72, 72)

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = (
            layer(t).view(*t.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
            for layer, t in ((self.wq, x), (self.wk, memory), (self.wv, memory))
        )
        if not self.skip:
            q = q + self.extra(x).view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)
        return self.wo(
            F.scaled_dot_product_attention(q, k, v, is_causal=x.shape == memory.shape)
            .transpose(1, 2)
            .flatten(2)
        )


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x).round()


PLAN = {"wq": "colwise", "wk": "colwise", "wv": "colwise", "extra": "colwise", "wo": "rowwise"}
