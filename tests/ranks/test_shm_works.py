"""The shm backend's works, and the calls that it refuses or leaves to gloo."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks

import tpkernels  # noqa: F401  registers the backend

SUM, PRODUCT = dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT


def column(*values, dtype=torch.float32):
    """Return a tensor whose elements are 4 apart in memory."""
    base = torch.full((len(values), 4), -7, dtype=dtype)
    base[:, 1] = torch.tensor(values, dtype=dtype)
    return base[:, 1]


@pytest.mark.parametrize("asynchronous", [False, True])
@run_on_ranks(2, 3, pool="shm_pool")
def test_a_callback_may_communicate(asynchronous):
    """Its collectives come before those that were called after the work, on every rank."""
    n, rank = dist.get_world_size(), dist.get_rank()
    for _ in range(20):
        first, inner, later = torch.ones(10), torch.full((10,), 2.0), torch.full((10,), 5.0)

        def reduce_inner(future, inner=inner):
            if asynchronous:
                work = dist.all_reduce(inner, async_op=True)
                return work.get_future().wait()[0] + future.value()[0]
            dist.all_reduce(inner)
            return inner + future.value()[0]

        chained = dist.all_reduce(first, async_op=True).get_future().then(reduce_inner)
        if rank == 0:
            gc.collect()  # this rank is late
        work = dist.all_reduce(later, async_op=True)
        assert chained.wait().tolist() == [3.0 * n] * 10
        work.wait()
        assert later.tolist() == [5.0 * n] * 10


@run_on_ranks(2, pool="shm_pool")
def test_a_callback_may_wait_for_its_own_work():
    x = torch.ones(3)
    work = dist.all_reduce(x, async_op=True)
    future = work.get_future().then(lambda future: work.wait())
    assert future.wait() is not None
    # A future that is asked for late, twice.
    assert (
        work.get_future().wait()[0].tolist() == [2, 2, 2] == work.get_future().value()[0].tolist()
    )


@pytest.mark.parametrize("op, expected", [(SUM, [3, 30]), (PRODUCT, [2, 200])], ids=str)
@run_on_ranks(2, pool="shm_pool")
def test_coalesced_tensors_are_all_done(op, expected):
    rank = dist.get_rank()
    tensors = [torch.full((200_000,), rank + 1.0), torch.full((3,), 10.0 * (rank + 1))]
    work = dist.all_reduce_coalesced(tensors, op, async_op=True)
    work.wait()
    assert [t.unique().tolist() for t in tensors] == [[v] for v in expected]
    assert len(work.value()) == 2  # c10d returns the work's future


@run_on_ranks(2, pool="shm_pool")
def test_sparse_tensors_and_their_ddp():
    rank = dist.get_rank()
    x = torch.eye(3).to_sparse()
    dist.all_reduce(x)
    assert torch.equal(x.to_dense(), 2 * torch.eye(3))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Embedding(10, 3, sparse=True))
    model(torch.tensor([rank, 2])).sum().backward()
    gradient = model.module.weight.grad.to_dense()
    assert gradient[:3, 0].tolist() == [0.5, 0.5, 1.0] and gradient.sum() == 6


@run_on_ranks(1, 2, 3, pool="shm_pool")
def test_tensors_that_are_not_contiguous():
    n, rank = dist.get_world_size(), dist.get_rank()
    root, total = n - 1, n * (n - 1) // 2
    x = column(rank, 1)
    dist.reduce(x, root)
    assert x.tolist() == ([total, n] if rank == root else [rank, 1])
    x = column(2.0, 3.0)
    dist.reduce(x, root, PRODUCT)
    assert x.tolist() == ([2**n, 3**n] if rank == root else x.tolist())
    for get in (lambda work: work.wait(), lambda work: work.get_future().wait()):
        x = column(2, 1)
        get(dist.all_reduce(x, PRODUCT, async_op=True))
        assert x.tolist() == [2**n, 1]
    x = column(True, rank == 0, dtype=torch.bool)
    work = dist.all_reduce(x, dist.ReduceOp.MIN, async_op=True)
    while not work.is_completed():
        pass
    assert x.tolist() == [True, n == 1]
    outs = [column(-1, -1) for _ in range(n)] if rank == root else None
    dist.gather(column(rank, 5), outs, root)
    assert outs is None or [o.tolist() for o in outs] == [[r, 5] for r in range(n)]
    x = column(-1, -1)
    dist.scatter(x, [column(r, 9) for r in range(n)] if rank == root else None, root)
    assert x.tolist() == [rank, 9]
    if n > 1 and rank < 2:
        x = column(4, 2) if rank == 0 else column(-1, -1)
        dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
        assert x.tolist() == [4, 2]


REFUSED = {
    "root": (lambda: dist.broadcast(torch.ones(2), 7), "invalid root rank: 7"),
    "negative root": (lambda: dist.reduce(torch.ones(2), -1), "invalid root rank: -1"),
    "expanded": (lambda: dist.all_reduce(torch.ones(1).expand(3)), r"strides \[0\]"),
    "meta outputs": (
        lambda: dist.all_gather([torch.ones(2, device="meta")] * 2, torch.ones(2)),
        "dense CPU tensors, got meta",
    ),
    "meta terms": (
        lambda: dist.reduce_scatter(torch.ones(2), [torch.ones(2, device="meta")] * 2),
        "dense CPU tensors, got meta",
    ),
    "length": (
        lambda: dist.all_gather([torch.ones(2)] * 3, torch.ones(2)),
        "takes one list of as many outputs, got 1 of 3",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@run_on_ranks(2, pool="shm_pool")
def test_refused_before_anything_is_sent(name):
    call, message = REFUSED[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()
    x = torch.ones(2)
    dist.all_reduce(x)
    assert x.tolist() == [2, 2]


@run_on_ranks(2, pool="shm_pool")
def test_a_group_dropped_under_its_works():
    """Works that nobody has waited for end, with callbacks that need the interpreter.

    One rank may go before another is done, whose works then fail: but none is left behind.
    """
    for _ in range(20):
        group = dist.new_group([0, 1], backend="shm")
        ended = []
        futures = [
            dist.all_reduce(torch.ones(5), group=group, async_op=True).get_future()
            for _ in range(3)
        ]
        for future in futures:
            future.add_done_callback(lambda future, ended=ended: ended.append(future))
        dist.destroy_process_group(group)
        del group
        gc.collect()
        assert all(future.done() for future in futures) and len(ended) == 3
        dist.barrier()


@run_on_ranks(2, pool="shm_pool")
def test_a_forked_child_is_refused_and_leaves_the_group_alone():
    dist.all_reduce(torch.ones(2), async_op=True).wait()  # the group's thread exists
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            dist.all_reduce(torch.ones(2))
            os.write(writing, b"taken")
        except Exception as error:
            os.write(writing, str(error).encode()[:500])
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(reading, 500).decode()
    assert "was forked from the rank" in said and "start a group in the child" in said
    x = torch.ones(2)
    dist.all_reduce(x)
    assert x.tolist() == [2, 2]
