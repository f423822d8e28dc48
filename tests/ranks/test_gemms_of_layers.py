"""Layers, losses and models that take each GEMM and packed weights."""

import copy
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gemms import GEMMS, IDS, OPS, PACKED, can, forced, integers, needs_packing
from helpers import EXACT
from pool import run_on_ranks
from torch import nn
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels import _C
from tpkernels.nn import parallel_linear

CASES = {
    f"{name}-{str(dtype)[6:]}": (gemm, dtype)
    for name, gemm in zip(IDS, GEMMS, strict=True)
    for dtype in (torch.float32, torch.bfloat16)
    if can(gemm, dtype)
}


@pytest.mark.parametrize("gemm, dtype", CASES.values(), ids=CASES)
@run_on_ranks(2)
def test_layers_and_losses_take_every_gemm(gemm, dtype):
    """Linears, a fused column group and the fused loss are exact on integers."""
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    torch.manual_seed(3)
    x, w, dy = (
        integers(40, 6 * world, dtype=dtype),
        integers(16, 6 * world, dtype=dtype),
        integers(40, 16, dtype=dtype),
    )
    mine = [t.chunk(world, 1)[rank].clone().requires_grad_() for t in (x, w)]
    with forced(gemm):
        for chunks in (1, 3):
            for t in mine:
                t.grad = None
            y = tpf.row_parallel_linear(*mine, group=group, overlap=chunks)
            assert_close(y, F.linear(x, w), **EXACT)
            y.backward(dy)
            assert_close(mine[0].grad, (dy @ w).chunk(world, 1)[rank], **EXACT)
            assert_close(mine[1].grad, (dy.t() @ x).chunk(world, 1)[rank], **EXACT)
            with torch.no_grad():
                for _ in range(3):
                    assert_close(
                        tpf.row_parallel_linear(*mine, group=group, overlap=chunks),
                        F.linear(x, w),
                        **EXACT,
                    )
        weights, dys = (
            [integers(n, 12, dtype=dtype) for n in (4, 8)],
            [integers(40, n, dtype=dtype) for n in (4, 8)],
        )
        inner = integers(40, 12, dtype=dtype)
        dx, *dws = OPS.column_linear_backward(
            dys, inner, weights, True, [True] * 2, [False] * 2, group.group_name, 3, "column"
        )
        total = sum(dy.float() @ w.float() for dy, w in zip(dys, weights, strict=True))
        assert_close(dx, (world * total).to(dtype), **EXACT)
        for dy, dw in zip(dys, dws, strict=True):
            assert_close(dw, dy.t() @ inner, **EXACT)
        tall, target = torch.randn(10, 8, requires_grad=True), torch.randint(0, 3 * world, (10,))
        dist.broadcast(tall.data, 0), dist.broadcast(target, 0)
        table = torch.randn(3 * world, 8)
        dist.broadcast(table, 0)
        part = table.chunk(world)[rank].clone().requires_grad_()
        tpf.vocab_parallel_linear_cross_entropy(
            tall, part, target, group=group, num_classes=3 * world
        ).backward()
        ours = tall.grad, part.grad
    whole, tall = table.requires_grad_(), tall.detach().requires_grad_()
    F.cross_entropy(tall @ whole.t(), target).backward()
    assert_close(ours[0], tall.grad)
    assert_close(ours[1], whole.grad.chunk(world)[rank])


def local_weight(layer):
    return layer.weight.to_local() if hasattr(layer.weight, "to_local") else layer.weight


def assert_same_outputs(x, stock, sharded):
    """Compare outputs until both weights are packed, and after."""
    with torch.no_grad():
        for _ in range(3):
            assert_close(sharded(x), stock(x), atol=1e-5, rtol=1e-5)
    for layer in (sharded[0], sharded[2]):
        assert _C.packed_bytes(local_weight(layer)), layer
    with torch.inference_mode():
        assert_close(sharded(x), stock(x), atol=1e-5, rtol=1e-5)


@needs_packing
@pytest.mark.parametrize("dtensor", [False, True])
@run_on_ranks(2)
def test_models_with_packed_weights(dtensor):
    """A model with packed weights follows every change of them, as the stock model does."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    x = torch.randn(8, 32)
    plan = {"0": "colwise", "2": "rowwise"}
    sharded = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, plan, dtensor=dtensor)
    same = partial(assert_same_outputs, x, stock, sharded)
    with forced(PACKED):
        same()
        assert "packed weights" in sharded[0].explain(8)
        assert "bytes are held now" in sharded[2].explain(8)
        optimizers = [
            torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
            for model in (sharded, stock)
        ]
        for _ in range(2):
            for model, optimizer in zip((sharded, stock), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                assert model is stock or not _C.packed_bytes(local_weight(sharded[2]))
                optimizer.step()
            same()
        assert_same_outputs(x, stock, copy.deepcopy(sharded))
        with torch.no_grad():
            for p in stock.parameters():
                p.mul_(1.5)
        tpk.load_unsharded_state_dict(sharded, stock.state_dict())
        same()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                assert_close(sharded(x).float(), stock(x).float(), atol=0.1, rtol=0.1)


@run_on_ranks(1)
def test_a_layer_of_one_rank_equals_the_stock_layer():
    """The short way and the long way of a layer agree, and errors stay errors."""
    stock = nn.Linear(48, 64)
    column, row = (
        cls.from_linear(stock, group=dist.group.WORLD)
        for cls in (tpk.nn.ColumnParallelLinear, tpk.nn.RowParallelLinear)
    )
    for layer in (column, row):
        for x in (
            torch.randn(5, 48),
            torch.randn(48),
            torch.randn(2, 3, 48),
            torch.randn(0, 48),
            torch.randn(48, 4).t(),
        ):
            with torch.no_grad():
                short = layer(x)
            assert_close(short, stock(x))
            long = layer(x)
            assert long.requires_grad and not short.requires_grad
            assert_close(short, long)
        with torch.no_grad():
            for bad, error in (
                (torch.randn(2, 47), ValueError),
                (torch.ones(2, 48, dtype=torch.long), TypeError),
                (torch.randn(2, 48).double(), TypeError),
            ):
                with pytest.raises(error):
                    layer(bad)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(torch.randn(2, 48)).dtype == torch.bfloat16
            x = torch.randn(6, 2, 48)
            assert_close(torch.vmap(layer)(x), layer(x))
            assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), stock(x))


@run_on_ranks(1, 2)
def test_inference_of_a_column_layer_takes_the_short_way():
    layer = tpk.nn.ColumnParallelLinear(8, 12, group=dist.group.WORLD)
    short = mock.Mock(wraps=parallel_linear.linear_fast_path)
    with mock.patch.object(parallel_linear, "linear_fast_path", short), torch.no_grad():
        y = layer(torch.randn(3, 8))
    short.assert_called_once()
    assert y.shape == (3, 12 // dist.get_world_size())
