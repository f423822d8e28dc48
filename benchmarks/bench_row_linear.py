"""What does a row-parallel layer cost beside the same GEMM and all-reduce written by hand? Two ranks on one machine, gloo."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tpkernels as tpk

FEATURES = 1024


def by_hand(tokens, train):
    x, weight = torch.randn(tokens, FEATURES // 2), torch.randn(FEATURES, FEATURES // 2, requires_grad=train)

    def call():
        with torch.no_grad():
            y = F.linear(x, weight)
            dist.all_reduce(y)
            if train:
                weight.grad = y.t() @ x
        return y

    return call


def layer(tokens, train):
    row = tpk.nn.RowParallelLinear(FEATURES, FEATURES, bias=False, group=dist.group.WORLD)
    x = torch.randn(tokens, FEATURES // 2)

    def call():
        with torch.set_grad_enabled(train):
            y = row(x)
        if train:
            row.weight.grad = None
            y.backward(y.detach())
        return y

    return call


@pytest.mark.parametrize("train", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("tokens", [1, 16, 128, 512])
@pytest.mark.parametrize("make", [by_hand, layer])
def test_row_linear(both_ranks, benchmark, make, tokens, train):
    benchmark.group = f"{tokens} tokens, {'training' if train else 'forward'}"
    both_ranks(make, tokens, train)
