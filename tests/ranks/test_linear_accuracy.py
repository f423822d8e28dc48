"""Column- and row-parallel linear: exact on integers, as accurate as partial sums in rank order."""

import pytest
import reference
import torch
import torch.distributed as dist
from linear_cases import check_linears_exactly
from pool import run_on_ranks

import tpkernels.functional as tpf
from tpkernels.sharding.spec import ShardSpec


@pytest.mark.parametrize("m, k, n", [(50, 13, 11), (300, 64, 96), (1, 5, 3), (0, 8, 8)])
@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@run_on_ranks(1, 2, 3, 4)
def test_integers_equal_nn_linear_exactly(chunks, m, k, n):
    check_linears_exactly(chunks, m, k, n, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@run_on_ranks(3)
def test_integers_are_exact_in_other_dtypes(dtype):
    check_linears_exactly(3, 50, 13, 11, dtype)


def assert_as_accurate(name, ours, same_dtype, truth):
    error, bound = (ours - truth).abs().max(), 2 * (same_dtype - truth).abs().max() + 1e-6
    assert error < bound, (
        f"{name} {ours.dtype} on {dist.get_world_size()}: {error:.2e}, the reference's {bound:.2e}"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@run_on_ranks(1, 2, 3, 4)
def test_as_accurate_as_partial_sums_in_rank_order(dtype):
    rows, k, n = 70, 333, 35
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    truth = torch.float64 if dtype == torch.float32 else torch.float32
    x, w, b, residual = (
        torch.randn(*shape).to(dtype) for shape in ((rows, k), (n, k), (n,), (rows, n))
    )
    features = ShardSpec.chunks(k, world, -1)
    xs, ws = ([features.shard(t, r) for r in range(world)] for t in (x, w))
    for chunks in (1, 3):
        for rest in (None, residual):
            out = tpf.row_parallel_linear(
                xs[rank], ws[rank], b, group=group, residual=rest, overlap=chunks
            )
            args = (
                [[t.to(d) for t in xs] for d in (dtype, truth)],
                [[t.to(d) for t in ws] for d in (dtype, truth)],
            )
            references = [
                reference.row_linear(a, c, b.to(d), None if rest is None else rest.to(d))
                for a, c, d in zip(*args, (dtype, truth), strict=True)
            ]
            assert_as_accurate("row", out, *references)

        # The weight is [k, n], with k output features.
        a, dy = (
            torch.randn(n, k).to(dtype).t(),
            torch.randn(rows, k).to(dtype),
        )
        outputs, columns = ShardSpec.chunks(k, world), ShardSpec.chunks(k, world, -1)
        weights, dys = (
            [spec.shard(t, r) for r in range(world)] for spec, t in ((outputs, a), (columns, dy))
        )
        leaf = residual.clone().requires_grad_()
        y = tpf.column_parallel_linear(leaf, weights[rank], group=group, overlap=chunks)
        y.backward(dys[rank])
        references = [
            reference.column_linear(residual.to(d), [t.to(d) for t in weights], [None] * world)[
                rank
            ]
            for d in (dtype, truth)
        ]
        assert_as_accurate("column", y, *references)
        references = [
            reference.column_linear_input_grad([t.to(d) for t in dys], [t.to(d) for t in weights])
            for d in (dtype, truth)
        ]
        assert_as_accurate("column's dx", leaf.grad, *references)
