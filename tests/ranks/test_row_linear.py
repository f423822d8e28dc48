"""RowParallelLinear: its options, and the norm that is fused with it."""

import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import EXACT
from one_rank import assert_near
from pool import run_on_ranks
from torch import nn
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import RMSNorm, RowParallelLinear
from tpkernels.sharding.spec import ShardSpec


@pytest.mark.parametrize("overlap", [False, 3])
@run_on_ranks(1, 3)
def test_row_options(overlap):
    group, rank = dist.group.WORLD, dist.get_rank()
    stock = nn.Linear(18, 23)
    x, residual = torch.randn(2, 35, 18), torch.randn(2, 35, 23)
    layer = RowParallelLinear.from_linear(stock, group=group, overlap=overlap)
    mine = layer.input_spec.shard(x, rank)
    assert_near(layer(mine), stock(x))
    assert_near(layer(mine, residual), stock(x) + residual)
    assert_near(layer(mine, residual.double()), stock(x) + residual.double())  # promotes, as + does
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


@pytest.mark.parametrize("overlap", [False, 3])
@pytest.mark.parametrize("shape", [(2, 35), (), (0,)], ids=str)
@run_on_ranks(1, 3)
def test_a_row_linear_with_the_norm_after_it(shape, overlap):
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    spec = ShardSpec.chunks(18, world, dim=-1)
    x, w, b, scale = (torch.randn(*s) for s in ((*shape, 18), (23, 18), (23,), (23,)))
    for bias, residual in itertools.product((None, b), (None, torch.randn(*shape, 23))):
        args = dict(group=group, residual=residual, overlap=overlap)
        inputs = spec.shard(x, rank), spec.shard(w, rank), bias
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
    with pytest.raises(ValueError, match=r"norm's weight has shape \(22,\)"):
        tpf.row_parallel_linear(*inputs, norm=(scale[1:], 1e-3), group=group)


@run_on_ranks(1, 3)
def test_a_row_parallel_layer_takes_a_norm_without_weight():
    bare = RowParallelLinear(18, 23, group=dist.group.WORLD, input_is_parallel=False)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            x = torch.randn(4, 18)
            normed, _ = bare(x, norm=RMSNorm(23, elementwise_affine=False))
            assert_close(normed, F.rms_norm(bare(x), (23,)))


@run_on_ranks(1, 3)
def test_the_norm_of_a_residual_of_a_wider_dtype():
    group, rank = dist.group.WORLD, dist.get_rank()
    spec = ShardSpec.chunks(18, dist.get_world_size(), dim=-1)
    x, w, b, scale = (torch.randn(*s) for s in ((4, 18), (23, 18), (23,), (23,)))
    scale.requires_grad_()
    residual = torch.randn(4, 23, dtype=torch.float64)
    leaf = spec.shard(x, rank).clone().requires_grad_()
    options = dict(group=group, residual=residual, norm=(scale, 1e-3))
    normed, total = tpf.row_parallel_linear(leaf, spec.shard(w, rank), b, **options)
    with torch.no_grad():
        again = tpf.row_parallel_linear(leaf, spec.shard(w, rank), b, **options)
    assert normed.dtype == total.dtype == torch.float64  # promotes, as + does
    assert_close(list(again), [normed.detach(), total.detach()], **EXACT)
    normed.sum().backward()
    theirs = x.double().requires_grad_()
    F.rms_norm(
        F.linear(theirs, w.double(), b.double()) + residual, (23,), scale.double(), 1e-3
    ).sum().backward()
    assert_close(leaf.grad.double(), spec.shard(theirs.grad, rank), atol=1e-4, rtol=1e-4)


@run_on_ranks(2)
def test_a_call_visits_four_python_files_before_its_op():
    layer = RowParallelLinear(18, 23, group=dist.group.WORLD)
    x = torch.randn(5, 9)
    package = Path(tpk.__file__).parent
    visited = set()

    def record(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            visited.add(str(path.relative_to(package)))

    with torch.no_grad():
        layer(x)  # chooses the schedule, which the next call looks up
        sys.setprofile(record)
        layer(x)
        sys.setprofile(None)
    assert visited == {
        "nn/row_linear.py",
        "sharding/module.py",
        "ops/row_linear.py",
        "ops/linear.py",
    }


@run_on_ranks(2)
def test_a_weight_that_is_no_matrix_is_refused_with_the_full_input_too():
    x, weight = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="weight must be a matrix"):
        tpf.row_parallel_linear(x, weight, group=dist.group.WORLD, input_is_parallel=False)
