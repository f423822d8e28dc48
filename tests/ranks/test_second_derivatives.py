"""Gradients of gradients are refused: they would be wrong in silence."""

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks

import tpkernels.functional as tpf
from tpkernels.nn import ColumnParallelLinear, ParallelMLP, RMSNorm, RowParallelLinear

IDS = torch.tensor([0, 5, 3])


def column(x, **options):
    return ColumnParallelLinear(8, 6, group=dist.group.WORLD, **options)(x)


def row(x, **options):
    return RowParallelLinear(16, 6, group=dist.group.WORLD, **options)(x)


def loss(logits):
    return tpf.vocab_parallel_cross_entropy(logits, IDS, group=dist.group.WORLD)


def linear_loss(x):
    return tpf.vocab_parallel_linear_cross_entropy(
        x, torch.rand(8, 8), IDS, num_classes=16, group=dist.group.WORLD
    )


def embedding(weight):
    return tpf.vocab_parallel_embedding(IDS, weight, 16, group=dist.group.WORLD)


# Each takes a tensor [3, 8].
OPS = {
    "column": column,
    "column, gathered": lambda x: column(x, gather_output=True),
    "column, activated": lambda x: column(x, activation="gelu"),
    "row": row,
    "row of a whole input": lambda x: row(torch.cat([x, x], -1), input_is_parallel=False),
    "row and norm": lambda x: RowParallelLinear(16, 6, group=dist.group.WORLD)(
        x, residual=torch.rand(3, 6), norm=RMSNorm(6)
    )[0],
    "mlp": lambda x: ParallelMLP(8, 12, activation="swiglu", group=dist.group.WORLD)(x),
    "loss": loss,
    "linear loss": linear_loss,
    "embedding": lambda x: embedding(torch.cat([x, x, x[:2]])),
    "rms_norm": tpf.rms_norm,
    "layer_norm": tpf.layer_norm,
    "bias_act": lambda x: tpf.bias_act(x, None, "gelu"),
    "gated_act": lambda x: tpf.gated_act(x, x.sin(), "swiglu"),
    "dropout": lambda x: tpf.dropout(x, 0.5),
    "rotary": lambda x: tpf.rotary(x.expand(1, 2, 3, 8), *tpf.rotary_tables(3, 8)),
}


@pytest.mark.parametrize("name", OPS)
@run_on_ranks(2)
def test_refused(name):
    x = torch.rand(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(OPS[name](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@run_on_ranks(2)
def test_parameters_gradients():
    layer = ColumnParallelLinear(8, 6, group=dist.group.WORLD)
    summed = RowParallelLinear(6, 8, group=dist.group.WORLD)
    out = summed(layer(torch.rand(3, 8)))
    for first in torch.autograd.grad(
        out.square().sum(), [layer.weight, summed.weight], create_graph=True
    ):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward(retain_graph=True)
