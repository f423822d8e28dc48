"""RowParallelLinear: its options, and the norm that is fused with it."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import EXACT
from one_rank import assert_near
from torch import nn
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import RMSNorm, RowParallelLinear
from tpkernels.sharding.spec import ShardSpec


def row_options():
    group, rank = dist.group.WORLD, dist.get_rank()
    stock = nn.Linear(18, 23)
    x, residual = torch.randn(2, 35, 18), torch.randn(2, 35, 23)
    for overlap in (False, 3):
        layer = RowParallelLinear.from_linear(stock, group=group, overlap=overlap)
        mine = layer.input_spec.shard(x, rank)
        assert_near(layer(mine), stock(x))
        assert_near(layer(mine, residual), stock(x) + residual)
        assert_near(
            layer(mine, residual.double()), stock(x) + residual.double()
        )  # promotes, as + does
        whole = RowParallelLinear.from_linear(
            stock, group=group, overlap=overlap, input_is_parallel=False
        )
        assert_close(whole(x, residual), layer(mine, residual), **EXACT)
        skipping = RowParallelLinear.from_linear(
            stock, group=group, overlap=overlap, skip_bias_add=True
        )
        for rest in (None, residual):
            out, bias = skipping(mine, rest)
            assert bias is skipping.bias
            assert_near(out + bias, stock(x) if rest is None else stock(x) + rest)
        out, bias = RowParallelLinear(18, 23, False, group=group, skip_bias_add=True)(mine)
        assert bias is None
    out = layer(mine, residual)
    others = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(others, out.detach())
    assert all(torch.equal(out, other) for other in others)


@pytest.mark.parametrize("ranks", [1, 3])
def test_row_options(pool, ranks):
    pool.run(ranks, row_options)


def row_linear_and_norm():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split, (w, b, scale) = (
        ShardSpec.chunks(18, world, dim=-1),
        (torch.randn(23, 18), torch.randn(23), torch.randn(23)),
    )
    for shape, overlap, bias, with_residual in itertools.product(
        ((2, 35), (), (0,)), (False, 3), (None, b), (False, True)
    ):
        x, residual = torch.randn(*shape, 18), torch.randn(*shape, 23) if with_residual else None
        args = dict(group=group, residual=residual, overlap=overlap)
        inputs = split.shard(x, rank), split.shard(w, rank), bias
        y = tpf.row_parallel_linear(*inputs, **args)
        seen = []
        for grad in (False, True):
            with torch.set_grad_enabled(grad), tpk.log_collectives() as log:
                normed, total = tpf.row_parallel_linear(
                    *inputs, norm=(scale.requires_grad_(grad), 1e-3), **args
                )
            assert_close(total, y, **EXACT)
            assert_close(normed, tpf.rms_norm(y, scale, 1e-3), **EXACT)
            assert normed.requires_grad == grad
            seen.append(log)
        assert seen[0] == seen[1] and (not x.numel() or world == 1 or seen[0])
    bare = RowParallelLinear(18, 23, group=group, input_is_parallel=False)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            normed, total = bare(
                x := torch.randn(4, 18), norm=RMSNorm(23, elementwise_affine=False)
            )
            assert_close(normed, F.rms_norm(bare(x), (23,)))
    with pytest.raises(ValueError, match=r"norm's weight has shape \(22,\)"):
        tpf.row_parallel_linear(*inputs, norm=(scale[1:], 1e-3), group=group)
    leaf, residual = (
        split.shard(x := torch.randn(4, 18), rank).clone().requires_grad_(),
        torch.randn(4, 23, dtype=torch.float64),
    )
    normed, total = tpf.row_parallel_linear(
        leaf, split.shard(w, rank), b, group=group, residual=residual, norm=(scale, 1e-3)
    )
    with torch.no_grad():
        again = tpf.row_parallel_linear(
            leaf, split.shard(w, rank), b, group=group, residual=residual, norm=(scale, 1e-3)
        )
    assert normed.dtype == total.dtype == torch.float64  # promotes, as + does
    assert_close(list(again), [normed.detach(), total.detach()], **EXACT)
    normed.sum().backward()
    theirs = x.double().requires_grad_()
    F.rms_norm(
        F.linear(theirs, w.double(), b.double()) + residual, (23,), scale.double(), 1e-3
    ).sum().backward()
    assert_close(leaf.grad.double(), split.shard(theirs.grad, rank), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_row_linear_with_the_norm_after_it(pool, ranks):
    pool.run(ranks, row_linear_and_norm)
