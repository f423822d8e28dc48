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
    rng = torch.Generator().manual_seed(rows + k)
    shapes = (rows, k), (n, k), (n,), (rows, n), (rows, n)
    x, w, b, dy, residual = (
        integers(*shape, generator=rng, dtype=dtype, device=device) for shape in shapes
    )
    leaves = [t.clone().requires_grad_() for t in (x, w, b, residual)]
    out = F.linear(*leaves[:3]) + leaves[3]
    out.backward(dy)
    grads = [t.grad for t in leaves]
    check_row_linear(chunks, (x, w, b, residual), out, dy, grads)
    check_column_linear(chunks, (x, w, b), dy, grads)


def check_row_linear(chunks, inputs, out, dy, grads):
    x, w, b, residual = inputs
    rank = dist.get_rank()
    options = dict(group=dist.group.WORLD, overlap=chunks)
    features = ShardSpec.chunks(x.shape[-1], dist.get_world_size(), 1)
    mine = [t.clone().requires_grad_() for t in (*(features.shard(t, rank) for t in (x, w)), b)]
    rest = residual.clone().requires_grad_()
    y = tpf.row_parallel_linear(*mine, residual=rest, **options)
    y.backward(dy)
    assert_close(y, out, **EXACT)
    wanted = features.shard(grads[0], rank), features.shard(grads[1], rank), *grads[2:]
    for ours, want in zip((*mine, rest), wanted, strict=True):
        assert_close(ours.grad, want, **EXACT)
    y = tpf.row_parallel_linear(*mine, **options)
    assert_close(y, F.linear(x, w, b), **EXACT)
    y = tpf.row_parallel_linear(*mine[:2], residual=residual, **options)
    assert_close(y, F.linear(x, w) + residual, **EXACT)


def check_column_linear(chunks, inputs, dy, grads):
    x, w, b = inputs
    rank = dist.get_rank()
    options = dict(group=dist.group.WORLD, overlap=chunks)
    outputs = ShardSpec.chunks(len(w), dist.get_world_size())
    columns = ShardSpec.chunks(len(w), dist.get_world_size(), -1)
    mine = [t.clone().requires_grad_() for t in (x, *(outputs.shard(t, rank) for t in (w, b)))]
    y = tpf.column_parallel_linear(*mine, **options)
    assert_close(y, columns.shard(F.linear(x, w, b), rank), **EXACT)
    y.backward(columns.shard(dy, rank))
    wanted = grads[0], outputs.shard(grads[1], rank), outputs.shard(grads[2], rank)
    for ours, want in zip(mine, wanted, strict=True):
        assert_close(ours.grad, want, **EXACT)
    y = tpf.column_parallel_linear(*mine, gather_output=True, out_spec=columns, **options)
    assert_close(y, F.linear(x, w, b), **EXACT)
