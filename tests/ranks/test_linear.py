"""Column- and row-parallel linear against nn.Linear."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

import tpkernels.functional as tpf
from tpkernels.sharding.spec import ShardSpec

EXACT = dict(atol=0, rtol=0)


def integers(*shape, dtype=torch.float32, generator=None, device="cpu"):
    """0, 1 and -1: every sum below is exact in float32, and small ones in bfloat16, in any order."""
    return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)


def exact(chunks, rows, k, n, dtype, device="cpu"):
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    rng = torch.Generator().manual_seed(rows + k)
    x, w, b = (
        integers(rows, k, generator=rng, dtype=dtype, device=device),
        integers(n, k, generator=rng, dtype=dtype, device=device),
        integers(n, generator=rng, dtype=dtype, device=device),
    )
    dy, residual = (
        integers(rows, n, generator=rng, dtype=dtype, device=device),
        integers(rows, n, generator=rng, dtype=dtype, device=device),
    )
    leaves = [t.clone().requires_grad_() for t in (x, w, b, residual)]
    out = F.linear(*leaves[:3]) + leaves[3]
    out.backward(dy)
    gx, gw, gb, gr = (t.grad for t in leaves)

    features = ShardSpec.chunks(k, world, 1)
    mine = [features.shard(t, rank).clone().requires_grad_() for t in (x, w)] + [
        t.clone().requires_grad_() for t in (b, residual)
    ]
    y = tpf.row_parallel_linear(
        mine[0], mine[1], mine[2], group=group, residual=mine[3], overlap=chunks
    )
    y.backward(dy)
    assert_close(y, out, **EXACT)
    for ours, want in zip(
        mine, (features.shard(gx, rank), features.shard(gw, rank), gb, gr), strict=True
    ):
        assert_close(ours.grad, want, **EXACT)
    assert_close(
        tpf.row_parallel_linear(mine[0], mine[1], mine[2], group=group, overlap=chunks),
        F.linear(x, w, b),
        **EXACT,
    )
    assert_close(
        tpf.row_parallel_linear(mine[0], mine[1], group=group, residual=residual, overlap=chunks),
        F.linear(x, w) + residual,
        **EXACT,
    )

    outputs = ShardSpec.chunks(n, world)
    mine = [x.clone().requires_grad_()] + [
        outputs.shard(t, rank).clone().requires_grad_() for t in (w, b)
    ]
    y = tpf.column_parallel_linear(*mine, group=group, overlap=chunks)
    columns = ShardSpec.chunks(n, world, -1)
    assert_close(y, columns.shard(F.linear(x, w, b), rank), **EXACT)
    y.backward(columns.shard(dy, rank))
    for ours, want in zip(
        mine, (gx, outputs.shard(gw, rank), outputs.shard(gb, rank)), strict=True
    ):
        assert_close(ours.grad, want, **EXACT)

    whole = tpf.column_parallel_linear(
        *mine, group=group, gather_output=True, out_spec=columns, overlap=chunks
    )
    assert_close(whole, F.linear(x, w, b), **EXACT)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
def test_integers_equal_nn_linear_exactly(pool, ranks, chunks):
    for rows, k, n in ((50, 13, 11), (300, 64, 96), (1, 5, 3), (0, 8, 8)):
        pool.run(ranks, exact, chunks, rows, k, n, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_integers_exact_in_other_dtypes(pool, dtype):
    pool.run(3, exact, 3, 50, 13, 11, dtype)


def disagreement(kind):
    """Each rank's message; without the check these hang, or return wrong numbers."""
    rank = dist.get_rank()
    x, w = torch.zeros(256, 4), torch.zeros(3, 4)
    os.environ["TPKERNELS_DEBUG"] = "1"
    try:
        tpf.row_parallel_linear(x, w, group=dist.group.WORLD, overlap=2)  # agreed
        if kind == "chunks":
            tpf.row_parallel_linear(x, w, group=dist.group.WORLD, overlap=1 + rank)
        elif kind == "rows":
            tpf.row_parallel_linear(x[rank:], w, group=dist.group.WORLD)
        elif kind == "order":
            order = [tpf.row_parallel_linear, tpf.column_parallel_linear]
            order[rank](x, w, group=dist.group.WORLD, **({"gather_output": True} if rank else {}))
    except RuntimeError as error:
        return str(error)
    finally:
        del os.environ["TPKERNELS_DEBUG"]


@pytest.mark.parametrize(
    "kind, differing",
    [("chunks", "chunk 0 of 2"), ("rows", "[255, 3]"), ("order", "all_gather for gather_output")],
)
def test_debug_names_the_ranks_that_disagree(pool, kind, differing):
    messages = pool.run(2, disagreement, kind)
    for message in messages:
        assert (
            "different collectives" in message
            and "rank 0: all_reduce for row_forward" in message
            and differing in message
        )
