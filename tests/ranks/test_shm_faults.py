"""The shm backend when a rank dies, is silent, leaves or makes a different call."""

import contextlib
import glob
import multiprocessing as mp
import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks

import tpkernels as tpk


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
    """Yield (processes, pipes) of ranks that a test may kill, about to run job(rank)."""
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


def interrupted(rank):
    try:
        dist.all_reduce(torch.ones(3))
    except KeyboardInterrupt:
        raise RuntimeError("KeyboardInterrupt") from None


def test_an_interrupt_ends_a_wait_within_a_second(tmp_path):
    with ranks_of_their_own(2, interrupted, tmp_path / "store") as (processes, pipes):
        pipes[0].send("go")
        time.sleep(0.5)
        os.kill(processes[0].pid, signal.SIGINT)
        assert answer(pipes[0], 1) == "RuntimeError: KeyboardInterrupt"


def test_a_silent_rank_is_named_after_the_timeout(tmp_path):
    with ranks_of_their_own(2, stop, tmp_path / "store", timeout=2) as (processes, pipes):
        for pipe in pipes:
            pipe.send("go")
        said = answer(pipes[0], 60)
        assert (
            "rank 1 did not come to all_reduce (sum) of 12 bytes of Float "
            "within the timeout of 2000 ms"
            in said
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


@pytest.mark.parametrize(
    "kind, second",
    [
        ("sizes", "rank 1: all_reduce (sum) of 20 bytes of Float"),
        ("ops", "rank 1: broadcast of 12 bytes from rank 1"),
        ("dtypes", "rank 1: all_reduce (sum) of 32 bytes of Float"),
    ],
    ids=["sizes", "ops", "dtypes"],
)
def test_ranks_that_make_different_calls_are_told(shm_pool, kind, second):
    first, other, third = shm_pool.run(3, differ, kind)
    assert first == other == third and first[1].strip() == second


@run_on_ranks(2, pool="shm_pool")
def test_split_sizes_that_do_not_match():
    rank = dist.get_rank()
    with pytest.raises(ValueError, match="rank 1 sends 4 bytes to rank 0, which expects 8"):
        dist.all_to_all_single(
            torch.empty(3 + rank), torch.ones(3), [1, 2 + rank] if rank == 0 else [2, 2], [1, 2]
        )
    dist.barrier()  # nothing was lost
