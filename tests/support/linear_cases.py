"""Column- and row-parallel linear against nn.Linear, on integers: every sum is exact."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import EXACT
from torch.testing import assert_close

import tpkernels.functional as tpf
from tpkernels.sharding.spec import ShardSpec


def integers(*shape, dtype=torch.float32, generator=None, device="cpu"):
    """Return 0, 1 and -1, whose sums are exact in float32, small ones in bfloat16, in any order."""
    return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)


def check_linears_exactly(chunks, rows, k, n, dtype, device="cpu"):
    """Compare both linears, their gradients and options with nn.Linear, on integers."""
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
