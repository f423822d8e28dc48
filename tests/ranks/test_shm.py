"""The shm backend: every collective against its definition, and what happens when a rank dies, is silent or does something else."""

import contextlib
import glob
import multiprocessing as mp
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from datetime import timedelta

import pytest
import test_linear
import torch
import torch.distributed as dist
from pool import Pool
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import tpkernels as tpk
from tpkernels import group as groups
from tpkernels import transport

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


@pytest.fixture(scope="module")
def shm_pool():
    pool = Pool(backend="shm")
    yield pool
    pool.close()
    pool.folder.cleanup()


def parts(count, dtype, low=0, high=4):
    """What every rank has: small integers, whose sums are exact in any dtype and order."""
    return [
        torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(r + count)).to(
            dtype
        )
        for r in range(dist.get_world_size())
    ]


def strided(tensor):
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def reductions(dtype, asynchronous):
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


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_reductions_are_exact(shm_pool, ranks):
    for i, dtype in enumerate(DTYPES):
        shm_pool.run(ranks, reductions, dtype, i % 2 == 1)


def moves():
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


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_moves_are_exact(shm_pool, ranks):
    shm_pool.run(ranks, moves)


def rest():
    """What shm lacks goes to gloo: other collectives, other reductions, other dtypes."""
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


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_shm_lacks_goes_to_gloo(shm_pool, ranks):
    shm_pool.run(ranks, rest)


def bits(dtype):
    """Every rank's bits, of messages that go one way and the other, and the bits of the sum in rank order."""
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


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_the_sum_is_in_rank_order_and_rounded_once(shm_pool, ranks):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        shm_pool.run(ranks, bits, dtype)


def special():
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


def test_nan_spreads(shm_pool):
    shm_pool.run(2, special)


def works():
    """Asynchronous works run in the order of their calls, whoever waits, or nobody; synchronous calls stay behind them."""
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


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_asynchronous_works(shm_pool, ranks):
    shm_pool.run(ranks, works)


def torch_code():
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


@pytest.mark.parametrize("ranks", [2, 3])
def test_plain_torch_code(shm_pool, ranks):
    shm_pool.run(ranks, torch_code)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_parallel_ops_are_exact(shm_pool, ranks, chunks):
    for rows, k, n, dtype in [
        (50, 13, 11, torch.float32),
        (300, 9, 33, torch.bfloat16),
        (0, 8, 4, torch.float32),
        (1, 64, 4096, torch.float32),
    ]:
        shm_pool.run(ranks, test_linear.exact, chunks, rows, k, n, dtype)


def blocks():
    """More rows than a half of the segment holds: several steps, each with its own slice of the residual."""
    n, rank, rows, columns = dist.get_world_size(), dist.get_rank(), 5000, 1024  # 20 MB
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    x, w = (
        test_linear.integers(rows, 4 * n, generator=generator),
        test_linear.integers(columns, 4 * n, generator=generator),
    )
    bias, residual = (
        test_linear.integers(columns, generator=generator),
        test_linear.integers(rows, columns, generator=generator),
    )
    mine = slice(4 * rank, 4 * rank + 4)
    out = tpk.functional.row_parallel_linear(
        x[:, mine], w[:, mine], bias, group=group, residual=residual
    )
    assert torch.equal(out, x @ w.t() + bias + residual)
    out = tpk.functional.row_parallel_linear(x[:, mine], w[:, mine], group=group)
    assert torch.equal(out, x @ w.t())


def test_messages_larger_than_the_memory(shm_pool):
    for ranks in (2, 3):
        shm_pool.run(ranks, blocks)


# ---------------------------------------------------------------- faults


def rank_main(rank, size, store, job, pipe, timeout):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "cpu:shm",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout),
    )
    pipe.send("ready")
    pipe.recv()
    try:
        job(rank)
        pipe.send("returned")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    pipe.recv()


@contextlib.contextmanager
def ranks_of_their_own(size, job, store, timeout=60):
    """Processes that a test may kill: (processes, pipes), all in a group and about to run job(rank)."""
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        processes.append(
            context.Process(
                target=rank_main, args=(rank, size, str(store), job, there, timeout), daemon=True
            )
        )
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        for pipe in pipes:
            assert pipe.poll(120) and pipe.recv() == "ready"
        yield processes, pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def all_reduces(rank):
    x = torch.ones(1 << 20)
    while True:
        dist.all_reduce(x)


def row_linears(rank):
    layer = tpk.nn.RowParallelLinear(64, 64, group=dist.group.WORLD)
    while True:
        layer(torch.ones(10, layer.weight.shape[1]))


def asynchronous(rank):
    while True:
        dist.all_reduce(torch.ones(1000), async_op=True).wait()


def answer(pipe, seconds):
    assert pipe.poll(seconds), f"no answer in {seconds} s"
    return pipe.recv()


@pytest.mark.parametrize("job", [all_reduces, row_linears, asynchronous])
@pytest.mark.parametrize("killed", [0, 2])
def test_a_killed_rank_is_named_within_5_seconds(tmp_path, job, killed):
    before = set(glob.glob("/dev/shm/*"))
    with ranks_of_their_own(3, job, tmp_path / "store") as (processes, pipes):
        for pipe in pipes:
            pipe.send("go")
        time.sleep(0.5)
        os.kill(processes[killed].pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        for rank in {0, 1, 2} - {killed}:
            assert re.search(
                f"DistBackendError: .*rank {killed} has died",
                answer(pipes[rank], deadline - time.monotonic()),
            )
        assert set(glob.glob("/dev/shm/*")) <= before  # nor at any time: segments have no name


def stop(rank):
    if rank == 1:
        dist.all_reduce(torch.ones(3))
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(3))
    dist.all_reduce(torch.ones(3))


def test_a_silent_rank_is_named_after_the_timeout(tmp_path):
    with ranks_of_their_own(2, stop, tmp_path / "store", timeout=2) as (processes, pipes):
        for pipe in pipes:
            pipe.send("go")
        said = answer(pipes[0], 60)
        assert (
            "rank 1 did not come to all_reduce (sum) of 12 bytes of Float within 2000 ms" in said
            and "alive" in said
        )
        os.kill(processes[1].pid, signal.SIGCONT)
        assert "rank 0 has left the group" in answer(pipes[1], 60)


def leave(rank):
    if rank == 1:
        dist.destroy_process_group()
    else:
        dist.all_reduce(torch.ones(3))


def test_a_rank_that_leaves_is_named(tmp_path):
    with ranks_of_their_own(3, leave, tmp_path / "store") as (_, pipes):
        for pipe in pipes:
            pipe.send("go")
        assert answer(pipes[1], 60) == "returned"
        for rank in (0, 2):
            assert "rank 1 has left the group, by destroy_process_group" in answer(pipes[rank], 60)


def differ(kind):
    rank = dist.get_rank()
    with pytest.raises(dist.DistBackendError) as caught:
        if kind == "sizes":
            dist.all_reduce(torch.ones(4 + rank))
        elif kind == "ops" and rank == 0:
            dist.barrier()
        elif kind == "ops":
            dist.broadcast(torch.ones(3), 1)
        elif kind == "dtypes":
            dist.all_reduce(torch.ones(8, dtype=torch.float32 if rank else torch.int32))
    with pytest.raises(
        dist.DistBackendError, match="different calls"
    ):  # and the group stays broken
        dist.all_reduce(torch.ones(1))
    return str(caught.value).splitlines()[1:4]


def test_ranks_that_make_different_calls_are_told(shm_pool):
    for kind, second in [
        ("sizes", "rank 1: all_reduce (sum) of 20 bytes of Float"),
        ("ops", "rank 1: broadcast of 12 bytes from rank 1"),
        ("dtypes", "rank 1: all_reduce (sum) of 32 bytes of Float"),
    ]:
        first, other, third = shm_pool.run(3, differ, kind)
        assert first == other == third and first[1].strip() == second


def uneven_splits():
    rank = dist.get_rank()
    with pytest.raises(ValueError, match="rank 1 sends 4 bytes to rank 0, which expects 8"):
        dist.all_to_all_single(
            torch.empty(3 + rank), torch.ones(3), [1, 2 + rank] if rank == 0 else [2, 2], [1, 2]
        )
    dist.barrier()  # nothing was lost


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
    assert len(set(first)) >= 4 and set(first) == set(
        second
    )  # two segments a group, the same files in both ranks


SMALL = """
import os, sys, warnings, multiprocessing as mp
import torch.distributed as dist
import tpkernels as tpk, torch
def main(rank, store, mode):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            dist.init_process_group("cpu:shm" if mode == "explicit" else "gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
            mesh = tpk.init_mesh(2, device="cpu")
            x = torch.ones(300000)
            tpk.all_reduce_(x, mesh["tp"])
            said = f"ran on {dist.get_backend(mesh['tp'].get_group())} {x.unique().tolist()} {[str(w.message) for w in caught]}"
        except Exception as error:
            said = f"raised {type(error).__name__} {error}"
    os.write(1, f"{rank} {said}\\n".encode())  # in one piece
if __name__ == "__main__":
    mp.set_start_method("spawn")
    ranks = [mp.Process(target=main, args=(r, *sys.argv[1:])) for r in range(2)]
    for p in ranks: p.start()
    for p in ranks: p.join()
"""


def with_room(tmp_path, kilobytes, mode, **environment):
    """What two ranks say that have a /dev/shm of `kilobytes`."""
    can = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if can.returncode:
        pytest.skip(
            "needs root (or user namespaces) for a /dev/shm of its own: unshare -m is refused"
        )
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs /dev/shm && exec {sys.executable} {script} {tmp_path / mode} {mode}"
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, **environment},
    )
    lines = sorted(line for line in run.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    assert len(lines) == 2, run.stdout + run.stderr
    return lines


def test_a_dev_shm_that_is_too_small_is_an_error_with_the_size(tmp_path):
    for line in with_room(tmp_path, 128, "explicit"):
        assert "raised" in line and re.search(
            r"/dev/shm: No space left on device: it has \d+ bytes free, and the 2 ranks need 270336",
            line,
        )


def test_init_mesh_falls_back_to_gloo_with_a_word(tmp_path):
    first, second = with_room(tmp_path, 128, "auto")
    assert "ran on gloo [2.0]" in first and "ran on gloo [2.0]" in second
    assert "/dev/shm has" in first and "the groups need 270,336 at the least" in first
    for line in with_room(tmp_path, 128, "forced", TPKERNELS_TRANSPORT="shm"):
        assert "raised RuntimeError TPKERNELS_TRANSPORT=shm, but /dev/shm has" in line


def test_a_small_dev_shm_is_made_do_with(tmp_path):
    for line in with_room(tmp_path, 1024, "tight"):
        assert "ran on shm [2.0]" in line


def transports():
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = {}
        for forced in (None, "gloo", "shm"):
            if forced:
                patch.setenv("TPKERNELS_TRANSPORT", forced)
            mesh = tpk.init_mesh(2, 2, device="cpu")
            layer = tpk.nn.RowParallelLinear(8, 8, group=mesh["tp"])
            seen[forced] = [dist.get_backend(mesh[d].get_group()) for d in ("tp", "dp")] + [
                layer.group.transport
            ]
            assert f"on {layer.group.transport}" in layer.explain(
                10
            ) or layer.group.transport in layer.explain(10)
        patch.setenv("TPKERNELS_TRANSPORT", "rdma")
        with pytest.raises(ValueError, match="TPKERNELS_TRANSPORT=rdma"):
            tpk.init_mesh(2, 2, device="cpu")
        patch.setenv("TPKERNELS_TRANSPORT", "shm")
        patch.setattr(
            transport,
            "shm_unavailable_reasons",
            lambda *rows: [None, "ranks 0 to 2 are on 2 hosts"],
        )
        with pytest.raises(
            RuntimeError, match="TPKERNELS_TRANSPORT=shm, but ranks 0 to 2 are on 2 hosts"
        ):
            tpk.init_mesh(2, 2, device="cpu")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(
            transport,
            "shm_unavailable_reasons",
            lambda *rows: [None, "ranks 0 to 2 are on 2 hosts"],
        )
        mesh = tpk.init_mesh(2, 2, device="cpu")
        seen["hosts"] = [dist.get_backend(mesh[d].get_group()) for d in ("tp", "dp")]
        patch.setenv("TPKERNELS_TRANSPORT", "gloo")
        group = dist.new_group([0, 1, 2, 3], backend="shm")
        x = torch.ones(3)
        dist.all_reduce(x, group=group)
        assert x.tolist() == [4] * 3
        assert groups.resolve_group(group).transport == "gloo"
        seen["said"] = [str(w.message) for w in caught]
    # a group that was passed keeps its transport, and it is said
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.warns(UserWarning, match="a group that was passed keeps its own transport, gloo"),
    ):
        patch.setenv("TPKERNELS_TRANSPORT", "shm")
        assert tpk.nn.RowParallelLinear(8, 8, group=dist.group.WORLD).group.transport == "gloo"
    return seen


def test_which_transport_a_mesh_takes(pool):
    results = pool.run(4, transports)
    for seen in results:
        assert seen[None] == ["shm", "shm", "shm"] == seen["shm"] and seen["gloo"] == [
            "gloo",
            "gloo",
            "gloo",
        ]
        assert seen["hosts"] == ["shm", "gloo"]
    said = results[0]["said"]
    assert any(
        "groups of 2 ranks run on gloo, not on shared memory: ranks 0 to 2 are on 2 hosts" in s
        for s in said
    )
    assert (
        any("a group that was asked for with shm runs on gloo" in s for s in said)
        and not results[1]["said"]
    )


def hosts():
    if dist.get_rank() == 1:
        tpk.transport._C = type(
            "Elsewhere",
            (),
            {
                "shm_host": staticmethod(lambda: "elsewhere"),
                "shm_free_bytes": staticmethod(lambda: 1 << 40),
            },
        )
    try:
        return tpk.transport.shm_unavailable_reasons(torch.arange(2).view(1, 2))
    finally:
        tpk.transport._C = tpk._C


def test_ranks_of_two_hosts(pool):
    first, second = pool.run(2, hosts)
    assert first == second and "ranks 0 to 1 are on 2 hosts" in first[0]


def test_split_sizes_that_do_not_match(shm_pool):
    shm_pool.run(2, uneven_splits)
