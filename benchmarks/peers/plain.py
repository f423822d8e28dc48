"""Plain PyTorch: F.linear and dist.all_reduce (Megatron-LM's f and g, Shoeybi et al. 2019), with any all-reduce.

A peer that is but an all-reduce (vLLM's, DeepSpeed's, ...) is measured in these layers.
"""

from __future__ import annotations

import copy

import stock
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def unavailable() -> str | None:
    return None


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, all_reduce):
        ctx.all_reduce = all_reduce
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        ctx.all_reduce(grad)
        return grad, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, all_reduce):
        all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def shard(parameter: Tensor, rank: int, size: int, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().chunk(size, dim)[rank].clone())


class Column(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, size: int, all_reduce):
        super().__init__()
        self.weight, self.bias = (
            shard(linear.weight, rank, size, 0),
            shard(linear.bias, rank, size, 0),
        )
        self.all_reduce = all_reduce

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            x = _CopyToRanks.apply(x, self.all_reduce)
        return F.linear(x, self.weight, self.bias)


class Row(nn.Module):
    def __init__(self, linear: nn.Linear, rank: int, size: int, all_reduce):
        super().__init__()
        self.weight, self.bias = (
            shard(linear.weight, rank, size, 1),
            nn.Parameter(linear.bias.detach().clone()),
        )
        self.all_reduce = all_reduce

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if torch.is_grad_enabled():
            y = _SumOverRanks.apply(y, self.all_reduce)
        else:
            self.all_reduce(y)
        return y + self.bias


class Peer:
    """One system in this process. `all_reduce` sums in place; column, row, mlp and block split what stock.py makes."""

    dtypes = (torch.float32, torch.bfloat16)

    def __init__(self, world):
        self.rank, self.size = world.rank, world.size

    def all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def column(self, linear: nn.Linear) -> nn.Module:
        return Column(linear, self.rank, self.size, self.all_reduce)

    def row(self, linear: nn.Linear) -> nn.Module:
        return Row(linear, self.rank, self.size, self.all_reduce)

    def mlp(self, mlp: stock.MLP) -> nn.Module:
        return stock.MLP(self.column(mlp.fc1), self.row(mlp.fc2))

    def block(self, block: stock.Block) -> nn.Module:
        norms = copy.deepcopy(block.norm1), copy.deepcopy(block.norm2)
        qkv = self.column(stock.by_rank(block.qkv, self.size))
        return stock.Block(
            norms, qkv, self.row(block.out), self.mlp(block.mlp), block.heads // self.size
        )
