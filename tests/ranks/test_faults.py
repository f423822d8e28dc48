"""Faults of ranks, over gloo and over shm: an error that says so in time, or right results."""

import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RanksFailed
from usage import usage

import tpkernels as tpk
import tpkernels.functional as tpf

SIZES = pytest.mark.parametrize("size", [2, 4])
TIMEOUT = 60  # seconds, of the pool's worlds
SOON = TIMEOUT / 2  # before the timeout, on a loaded machine too
# gloo says this of a peer that is gone, which it does not name.
GLOO = r"Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting \d+ms"


def all_reduce(value, group):
    x = torch.full(((2 << 20) + 1,), value)  # two steps of shm
    return tpk.all_reduce_(x, group)


def row_linear(value, group):
    x, weight = torch.full((3, 2), value), torch.full((4, 2), 0.5)
    return tpf.row_parallel_linear(x, weight, group=group)


def asynchronous(value, group):
    x = torch.full((1000,), value)
    dist.all_reduce(x, group=group, async_op=True).wait()
    return x


WORKS = {"all_reduce": all_reduce, "row_linear": row_linear, "asynchronous": asynchronous}


def step(work, number, group=None):
    """Do a step, in which every rank's values differ from its others, and check its result."""
    rank, size = dist.get_rank(), dist.get_world_size()
    total = WORKS[work](float(rank + number), group or dist.group.WORLD)
    assert (total == sum(range(size)) + size * number).all()


def error_of(call):
    """Return what c10d's error says and after how long, or None."""
    start = time.monotonic()
    try:
        call()
    except RuntimeError as error:
        return str(error), time.monotonic() - start


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise KeyError("on purpose")


# Each way to stop has what the pool then says of the rank, and what its peers say over shm.
STOPS = {
    "return": (dist.destroy_process_group, None, "has left the group, by destroy_process_group"),
    "error": (fail, "KeyError", "has left the group"),
    "exit": (partial(sys.exit, 3), "SystemExit: 3", "has left the group"),
    "kill": (kill, r"died \(SIGKILL\)", r"has died \(its process has ended\)"),
}


KEPT = []  # it outlives a call


def stop_at(steps, work, how):
    """Stop after `steps` of this rank, or return the steps done and the error before that."""
    # Over shm a rank leaves even if a layer still holds the group, as a model's do. Over gloo its
    # peers would see it only at the timeout.
    if dist.get_backend() == "shm":
        KEPT[:] = [tpk.nn.RowParallelLinear(8, 8, group=dist.group.WORLD)]
    for number in range(steps[dist.get_rank()]):
        if error := error_of(partial(step, work, number)):
            dist.destroy_process_group()  # what any program does that ends by an error
            return number, *error
    STOPS[how][0]()


def kill_in_the_middle(killed, work):
    if dist.get_rank() == killed:
        threading.Timer(0.2, kill).start()
    return stop_at([10**9] * dist.get_world_size(), work, "return")


@pytest.fixture(scope="module", params=["gloo", "shm"])
def fault_pool(request):
    with Pool(backend=request.param, start="forkserver") as pool:
        yield pool


def results_in_spite_of(failure, pool, *call):
    """Return the ranks' results in a call that fails so, if there is a `failure`."""
    if failure is None:
        return pool.run(*call)
    with pytest.raises(RanksFailed, match=failure) as caught:
        pool.run(*call)
    return caught.value.results


def assert_told(results, stopped, pool, shm_says):
    """Assert that all ranks but the `stopped` one have been told in time why they cannot go on."""
    others = [result for rank, result in enumerate(results) if rank != stopped]
    assert None not in others
    says = GLOO if pool.backend == "gloo" else rf"shm transport: rank {stopped} {shm_says}"
    for *_, said, seconds in others:
        assert re.search(says, said) and seconds < SOON, (said, seconds)


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("how", STOPS)
@SIZES
def test_ranks_that_stop_at_different_steps(fault_pool, size, how, work):
    stopped = list(STOPS).index(how) % size
    steps = [5 + 3 * ((rank - stopped) % size) for rank in range(size)]
    _, failure, shm_says = STOPS[how]
    failure = failure and f"^rank {stopped}:? {failure}"
    results = results_in_spite_of(failure, fault_pool, size, stop_at, steps, work, how)
    assert results[stopped] is None
    assert_told(results, stopped, fault_pool, shm_says)
    # gloo may not have sent all of the last step when it closes its connections.
    done = [result[0] for rank, result in enumerate(results) if rank != stopped]
    assert set(done) <= ({5} if fault_pool.backend == "shm" else {4, 5})


@pytest.mark.parametrize("work", WORKS)
@SIZES
def test_a_rank_that_is_killed_in_the_middle(fault_pool, size, work):
    killed = size // 2
    results = results_in_spite_of(
        rf"^rank {killed} died \(SIGKILL\)", fault_pool, size, kill_in_the_middle, killed, work
    )
    assert_told(results, killed, fault_pool, STOPS["kill"][2])


def fall_silent(silent, seconds):
    """Return what a group of this timeout says when one rank is stopped, and when it goes on."""
    group = dist.new_group(timeout=timedelta(seconds=seconds))
    size, store = dist.get_world_size(), dist.distributed_c10d._get_default_store()
    processes = [0] * size
    dist.all_gather_object(processes, os.getpid())
    step("asynchronous", 0, group)
    dist.barrier()
    if dist.get_rank() == silent:
        os.kill(os.getpid(), signal.SIGSTOP)
        # Over shm the others have left their parts of the first step.
        return error_of(lambda: [step("asynchronous", number, group) for number in (1, 2)])
    error = error_of(partial(step, "asynchronous", 1, group))
    dist.destroy_process_group(group)
    if store.add("told", 1) == size - 1:
        os.kill(processes[silent], signal.SIGCONT)
    return error


@SIZES
def test_a_rank_that_is_silent(fault_pool, size):
    results = fault_pool.run(size, fall_silent, 1, 3)
    shm_says = (
        r"did not come to all_reduce \(sum\) of 4000 bytes of Float within the timeout of 3000 ms; "
        "its process is alive"
    )
    assert_told(results, 1, fault_pool, shm_says)
    said, _ = results[1]
    assert re.search(GLOO if fault_pool.backend == "gloo" else r"rank \d has left the group", said)


def interrupt(work):
    """Interrupt the first rank in a wait for the others, which come when it has ended.

    Returns:
        on the first rank how long after the signal the interrupt came, the error before it, and the
        error of later steps; on the others the error that they get.
    """
    group = dist.new_group(timeout=timedelta(seconds=3))
    store = dist.distributed_c10d._get_default_store()
    dist.barrier()
    if dist.get_rank() > 0:
        store.wait(["interrupted"])
        # Over shm the first rank has left its part of the first step.
        return error_of(lambda: [step(work, number, group) for number in range(3)])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sent, error = [], None

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(0.3, send).start()
    try:
        error = error_of(partial(step, work, 0, group))
        time.sleep(SOON)
    except KeyboardInterrupt as interrupt:
        seconds = time.monotonic() - sent[0]
        error = error or (str(interrupt.__context__), 0)
    store.set("interrupted", "")
    return seconds, error[0], error_of(lambda: [step(work, number, group) for number in (1, 2)])


@SIZES
def test_an_interrupt_ends_a_wait(fault_pool, size):
    is_shm = fault_pool.backend == "shm"
    for work in WORKS if is_shm else ["row_linear"]:
        (seconds, before, later), *others = fault_pool.run(size, interrupt, work)
        if is_shm:
            assert seconds < 1 and before == "None"
        else:  # gloo waits until its timeout without looking up
            assert seconds < SOON and "Timed out waiting 3000ms" in before
        if is_shm and later is None:  # another thread did the asynchronous work nevertheless
            assert work == "asynchronous" and others == [None] * (size - 1)
        else:
            assert not is_shm or "this rank was interrupted in" in later[0]
            assert_told([None, *others], 0, fault_pool, "has left the group")


def fork(use_group):
    """Fork in the middle of steps; return what the child says of the group, if it uses it."""
    group = dist.group.WORLD
    for name in WORKS:
        step(name, 0)
    before, _ = usage()
    x = torch.ones(1000)
    work = dist.all_reduce(x, async_op=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            errors = [error_of(partial(step, work, 1)) for work in WORKS if use_group]
            # destroy_process_group begins so. It would then wait for ever for threads of gloo,
            # which a child does not have.
            group.shutdown()
            os.write(writing, "\n".join(said for said, _ in errors).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    work.wait()
    assert (x == dist.get_world_size()).all()
    for name in WORKS:
        step(name, 2, group)
    assert usage()[0] == before
    return said


@SIZES
def test_a_fork_does_no_harm(fault_pool, size):
    """Over shm the child is refused. Over gloo it must not use the sockets, its parent's too."""
    refused = fault_pool.backend == "shm"
    for said in fault_pool.run(size, fork, refused):
        errors = said.splitlines()
        assert len(errors) == (len(WORKS) if refused else 0)
        for error in errors:
            assert re.search("was forked from the rank.*start a group in the child", error)
