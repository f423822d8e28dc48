"""The shm backend: every collective against its definition."""

import threading
import time

import linear_cases
import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import tpkernels as tpk

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
]


PIECE = 256 << 10  # csrc/shm/collectives.h


def parts(count, dtype, low=0, high=4):
    """Return every rank's small integers, whose sums are exact in any dtype and order."""
    return [
        torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(r + count)).to(
            dtype
        )
        for r in range(dist.get_world_size())
    ]


def strided(tensor):
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize(
    "dtype, asynchronous", [(dtype, i % 2 == 1) for i, dtype in enumerate(DTYPES)], ids=str
)
@run_on_ranks(1, 2, 3, 4, pool="shm_pool")
def test_reductions_are_exact(dtype, asynchronous):
    n, rank = dist.get_world_size(), dist.get_rank()
    itemsize = dtype.itemsize
    for count in (0, 1, 13, 1000, (32 << 10) // itemsize, 2 * PIECE // itemsize + 77):
        all_parts = parts(count, dtype)
        stacked = torch.stack(all_parts)
        wide = stacked.double() if dtype.is_floating_point else stacked
        cases = [("SUM", wide.sum(0)), ("MAX", wide.amax(0)), ("MIN", wide.amin(0))]
        if dtype.is_floating_point:
            cases.append(("AVG", wide.sum(0) / n))
        for name, expected in cases:
            for layout in (torch.clone, strided):
                x = layout(all_parts[rank])
                work = dist.all_reduce(x, getattr(dist.ReduceOp, name), async_op=asynchronous)
                if asynchronous:
                    work.wait()
                    assert work.is_completed()
                assert torch.equal(x, expected.to(dtype)), (name, count, dtype)
        scattered = torch.stack(
            [torch.cat([all_parts[(r + i) % n] for i in range(n)]) for r in range(n)]
        ).view(n, n, count)
        out = torch.empty(count, dtype=dtype)
        dist.reduce_scatter_tensor(out, scattered[rank].flatten())
        assert torch.equal(out, scattered[:, rank].sum(0).to(dtype)), (count, dtype)
        out = torch.empty(count, dtype=dtype)
        dist.reduce_scatter(out, list(scattered[rank].unbind()))
        assert torch.equal(out, scattered[:, rank].sum(0).to(dtype)), (count, dtype)


@run_on_ranks(1, 2, 3, 4, pool="shm_pool")
def test_moves_are_exact():
    n, rank = dist.get_world_size(), dist.get_rank()
    for dtype in (torch.float32, torch.bool, torch.complex64, torch.uint8):
        for count in (0, 1, 1001, PIECE // 4 + 3):
            mine = parts(count, torch.int64)
            mine = [p.to(dtype) for p in mine]
            out = torch.empty(n * count, dtype=dtype)
            dist.all_gather_into_tensor(out, strided(mine[rank]))
            assert torch.equal(out, torch.cat(mine))
            outs = [strided(torch.empty(count, dtype=dtype)) for _ in range(n)]
            dist.all_gather(outs, mine[rank])
            assert all(map(torch.equal, outs, mine))
            for root in range(n):
                x = strided(mine[rank])
                dist.broadcast(x, root)
                assert torch.equal(x, mine[root])
            dist.all_to_all_single(out, torch.cat([mine[rank]] * n))
            assert torch.equal(out, torch.cat(mine))
    # rank r sends r + i elements to rank i
    sent, received = [rank + i for i in range(n)], [r + rank for r in range(n)]
    x = torch.cat([torch.full((k,), 10 * rank + i) for i, k in enumerate(sent)])
    out = torch.empty(sum(received), dtype=x.dtype)
    dist.all_to_all_single(out, x, received, sent)
    assert out.tolist() == [10 * r + rank for r in range(n) for _ in range(r + rank)]
    outs = [torch.empty(k, dtype=x.dtype) for k in received]
    dist.all_to_all(outs, list(x.split(sent)))
    assert torch.equal(torch.cat(outs), out)
    dist.barrier()


@run_on_ranks(1, 3, pool="shm_pool")
def test_what_shm_lacks_goes_to_gloo():
    """Gloo has the other collectives, reductions and dtypes."""
    n, rank = dist.get_world_size(), dist.get_rank()
    x = torch.full((3,), rank + 1)
    dist.all_reduce(x, dist.ReduceOp.PRODUCT)
    assert x.tolist() == [torch.arange(1, n + 1).prod().item()] * 3
    x = torch.full((3,), complex(rank, 1))
    dist.all_reduce(x)
    assert x[0] == complex(sum(range(n)), n)
    gathered = [None] * n
    dist.all_gather_object(gathered, {"rank": rank})
    assert gathered == [{"rank": r} for r in range(n)]
    outs = [torch.empty(2) for _ in range(n)] if rank == 0 else None
    dist.gather(torch.full((2,), float(rank)), outs)
    assert rank or [o[0].item() for o in outs] == list(range(n))
    x = torch.empty(2)
    dist.scatter(x, [torch.full((2,), float(r)) for r in range(n)] if rank == 0 else None)
    assert x[0] == rank
    if n > 1:
        if rank == 0:
            dist.send(torch.tensor([5.0]), 1)
        elif rank == 1:
            dist.recv(x[:1], 0)
            assert x[0] == 5
    with pytest.raises(ValueError, match="average of integers"):
        dist.all_reduce(torch.ones(2, dtype=torch.int64), dist.ReduceOp.AVG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@run_on_ranks(2, 3, 4, 6, pool="shm_pool")
def test_the_sum_is_in_rank_order_and_rounded_once(dtype):
    """Small and large all-reduces take different ways and give the same bits."""
    n, rank = dist.get_world_size(), dist.get_rank()
    values = [
        torch.randn(70000, generator=torch.Generator().manual_seed(r)).to(dtype) for r in range(n)
    ]
    expected = values[0].float()
    for v in values[1:]:
        expected = expected + v.float()
    for count in (5, 3000, 70000):
        x = values[rank][:count].clone()
        dist.all_reduce(x)
        assert torch.equal(x, expected[:count].to(dtype)), (count, dtype)


@run_on_ranks(2, pool="shm_pool")
def test_nan_spreads():
    x = torch.tensor([1.0, float("nan"), float("inf"), 1.0])
    if dist.get_rank() == 1:
        x = torch.tensor([float("nan"), 1.0, -float("inf"), 2.0])
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
        y = x.clone()
        dist.all_reduce(y, op)
        assert y[:2].isnan().all() and not y[3].isnan()
    y = x.clone()
    dist.all_reduce(y)
    assert y[2].isnan()


@run_on_ranks(1, 2, 3, pool="shm_pool")
def test_asynchronous_works():
    """Works run in the order of their calls, whoever waits or nobody.

    Synchronous calls stay behind them.
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    xs = [torch.full((50000,), float(i + rank)) for i in range(20)]
    pending = [dist.all_reduce(x, async_op=True) for x in xs]
    after = torch.ones(3)
    dist.all_reduce(after)
    assert after.tolist() == [n] * 3
    for i in reversed(range(20)):
        pending[i].wait()
        assert (xs[i] == n * i + sum(range(n))).all()
    x = torch.ones(5)
    work = dist.all_reduce(x, async_op=True)
    deadline = time.monotonic() + 60
    while not work.is_completed():  # nobody waits: the group's thread does it
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert x.tolist() == [n] * 5
    futures = [dist.all_reduce(torch.ones(4) * i, async_op=True).get_future() for i in range(3)]
    assert [f.wait()[0][0].item() for f in futures] == [0, n, 2 * n]
    with torch.inference_mode():
        x = strided(torch.ones(4))
        dist.all_reduce(x, async_op=True).wait()
    assert x.tolist() == [n] * 4
    # forgotten while under way
    dist.all_reduce(torch.ones(9), async_op=True)
    threads = [threading.Thread(target=lambda: dist.all_reduce(torch.ones(100))) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    dist.barrier()


@run_on_ranks(2, 3, pool="shm_pool")
def test_plain_torch_code():
    """DTensor, DDP and FSDP on the group, against one process."""
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (n,))
    assert dist.get_backend(mesh.get_group()) == "shm"
    whole = torch.arange(30.0).view(5, 6)
    x = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(x.redistribute(mesh, [Replicate()]).to_local(), whole)
    assert torch.equal(x.sum(0).full_tensor(), whole.sum(0))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4)
    ).double()
    data = torch.randn(n, 3, 8, dtype=torch.double)
    (model(data.flatten(0, 1)).square().sum() / n).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    ddp(data[rank]).square().sum().backward()
    assert all(map(torch.allclose, [p.grad for p in model.parameters()], expected))
    model.zero_grad()
    fully_shard(model, mesh=mesh)
    model(data[rank]).square().sum().backward()
    assert all(map(torch.allclose, [p.grad.full_tensor() for p in model.parameters()], expected))


@pytest.mark.parametrize(
    "m, k, n, dtype",
    [
        (50, 13, 11, torch.float32),
        (300, 9, 33, torch.bfloat16),
        (0, 8, 4, torch.float32),
        (1, 64, 4096, torch.float32),
    ],
)
@pytest.mark.parametrize("chunks", [1, 3])
@run_on_ranks(1, 2, 3, 4, pool="shm_pool")
def test_the_parallel_ops_are_exact(chunks, m, k, n, dtype):
    linear_cases.check_linears_exactly(chunks, m, k, n, dtype)


@run_on_ranks(2, 3, pool="shm_pool")
def test_messages_larger_than_the_memory():
    """More rows than a slot holds take several steps, each with its slice of the residual."""
    n, rank, rows, columns = dist.get_world_size(), dist.get_rank(), 5000, 1024  # 20 MB
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    x, w = (
        linear_cases.integers(rows, 4 * n, generator=generator),
        linear_cases.integers(columns, 4 * n, generator=generator),
    )
    bias, residual = (
        linear_cases.integers(columns, generator=generator),
        linear_cases.integers(rows, columns, generator=generator),
    )
    mine = slice(4 * rank, 4 * rank + 4)
    out = tpk.functional.row_parallel_linear(
        x[:, mine], w[:, mine], bias, group=group, residual=residual
    )
    assert torch.equal(out, x @ w.t() + bias + residual)
    out = tpk.functional.row_parallel_linear(x[:, mine], w[:, mine], group=group)
    assert torch.equal(out, x @ w.t())


def two_jobs():
    """Two groups of the same ranks and names of others: each has memory of its own."""
    other = dist.new_group(list(range(dist.get_world_size())), backend="shm")
    x, y = torch.ones(5), torch.full((5,), 10.0)
    works = [dist.all_reduce(x, async_op=True), dist.all_reduce(y, group=other, async_op=True)]
    for work in works:
        work.wait()
    assert x[0] == 2 and y[0] == 20
    return [line.split()[4] for line in open("/proc/self/maps") if "/dev/shm/" in line]


def test_groups_share_nothing(shm_pool):
    first, second = shm_pool.run(2, two_jobs)
    # Each group has two segments, the same files in both ranks.
    assert len(set(first)) >= 4 and set(first) == set(second)
