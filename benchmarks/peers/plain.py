"""Plain PyTorch layers: F.linear and dist.all_reduce, or another GEMM and another all-reduce.

They are Megatron-LM's f and g (Shoeybi et al. 2019) written out. A system that offers only an
all-reduce (vLLM, DeepSpeed, OpenMPI) is measured in these layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import stock
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

AllReduce = Callable[[Tensor], None]  # sums over the ranks, in place
Linear = Callable[..., Tensor]  # called as F.linear is


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


def shards(linear: nn.Linear, rank: int, size: int, dim: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Returns this rank's shard of the weight along `dim`, and of the bias along dim 0 or all."""
    weight = shard(linear.weight, rank, size, dim)
    if dim == 0:
        return weight, shard(linear.bias, rank, size, 0)
    return weight, nn.Parameter(linear.bias.detach().clone())


def fill(layer: nn.Module, linear: nn.Linear, rank: int, size: int, dim: int) -> None:
    """Copies this rank's shard of `linear` into a peer's layer."""
    with torch.no_grad():
        for to, source in zip(
            (layer.weight, layer.bias), shards(linear, rank, size, dim), strict=True
        ):
            to.copy_(source)


class Column(nn.Module):
    """A linear layer whose output features are sharded; backward all-reduces the input's gradient.

    Args:
        weight: [N / R, K], this rank's rows.
        bias: [N / R].
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter, all_reduce: AllReduce, linear: Linear
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.all_reduce, self.linear = all_reduce, linear

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            x = _CopyToRanks.apply(x, self.all_reduce)
        return self.linear(x, self.weight, self.bias)


class Row(nn.Module):
    """A linear layer whose input features are sharded; forward all-reduces the output.

    Args:
        weight: [N, K / R], this rank's columns.
        bias: [N], the same on every rank.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter, all_reduce: AllReduce, linear: Linear
    ):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.all_reduce, self.linear = all_reduce, linear

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x, self.weight)
        if torch.is_grad_enabled():
            y = _SumOverRanks.apply(y, self.all_reduce)
        else:
            self.all_reduce(y)
        return y + self.bias


class Peer:
    """One system in this process. Its column, row, mlp and block shard the modules of stock.py."""

    dtypes = (torch.float32, torch.bfloat16)
    linear: Linear = staticmethod(F.linear)

    def __init__(self, world):
        self.rank, self.size = world.rank, world.size

    def all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)

    def column(self, linear: nn.Linear) -> nn.Module:
        weight, bias = shards(linear, self.rank, self.size, 0)
        return Column(weight, bias, self.all_reduce, self.linear)

    def row(self, linear: nn.Linear) -> nn.Module:
        weight, bias = shards(linear, self.rank, self.size, 1)
        return Row(weight, bias, self.all_reduce, self.linear)

    def mlp(self, mlp: stock.MLP) -> nn.Module:
        return stock.MLP(self.column(mlp.fc1), self.row(mlp.fc2))

    def block(self, block: stock.Block) -> nn.Module:
        norms = copy.deepcopy(block.norm1), copy.deepcopy(block.norm2)
        qkv = self.column(stock.by_rank(block.qkv, self.size))
        heads = block.heads // self.size
        return stock.Block(norms, qkv, self.row(block.out), self.mlp(block.mlp), heads)
