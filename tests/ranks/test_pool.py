"""The pool of ranks that the other tests run on: results, failures, deaths and hangs."""

import ctypes
import importlib
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RanksFailed, run_on_ranks

FOREVER = 10**6  # seconds
SIZES = pytest.mark.parametrize("size", [2, 4])


def sum_of_ranks(offset, *, scale=1):
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), scale * total.item()


def assert_works(pool, size=2):
    """Assert that a call's results are its own, and that all its ranks leave."""
    expected = [(rank, size * (size - 1) // 2) for rank in range(size)]
    assert pool.run(size, sum_of_ranks, 0) == expected


def fail_on(rank):
    dist.barrier()
    if dist.get_rank() == rank:
        raise KeyError("on purpose")
    dist.barrier()


def exit_with_words():
    print("the last words", file=sys.stderr)
    os._exit(3)


# Ways to die, the name of the death and what stderr then has.
DEATHS = {
    "abort": (os.abort, "SIGABRT", "(?s)Fatal Python error: Aborted.*in die_on"),
    "kill": (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL", ""),
    "exit": (exit_with_words, "exit code 3", "the last words"),
    "terminate": (
        lambda: ctypes.CDLL("libstdc++.so.6")._ZSt9terminatev(),
        "SIGABRT",
        "(?s)^terminate called without an active exception.*in die_on",
    ),
}


def die_on(rank, how):
    dist.barrier()  # a peer that still connects to a dead rank waits for it
    if dist.get_rank() == rank:
        DEATHS[how][0]()
    dist.barrier()


def die_after_the_answer(rank, at, fails):
    """Return, or fail, and die on `rank` where the pool next calls dist's function `at`."""
    if dist.get_rank() == rank:
        setattr(dist, at, os.abort)
        if fails:
            raise KeyError("on purpose")
    time.sleep(0.3)  # so that the pool speaks to a rank that is dead
    return torch.full((1000,), float(dist.get_rank()))


def die_later(rank, seconds):
    if dist.get_rank() == rank:
        threading.Timer(seconds, os.abort).start()


def sleep_on(ranks):
    if dist.get_rank() in ranks:
        time.sleep(FOREVER)


def fail_or_sleep(rank):
    if dist.get_rank() == rank:
        raise KeyError("on purpose")
    time.sleep(FOREVER)


class Unreadable:
    def __reduce__(self):
        return len, (3,)


def return_what_cannot_be_sent(rank, what):
    if dist.get_rank() == rank:
        return {"lambda": lambda: None, "unreadable": Unreadable()}[what]
    return "fine"


def fork(folder, child_returns):
    """Fork a child that returns as its parent does, or one that outlives its parent."""
    child = os.fork()
    if child:
        Path(folder, str(child)).touch()
        return "parent" if child_returns else os.abort()
    if not child_returns:
        time.sleep(FOREVER)
    return "child"


def process_id():
    return os.getpid()


def tell_process_and_sleep(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(FOREVER)


def process_is_there(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def own_pool():
    with Pool(start="forkserver") as pool:
        yield pool


@pytest.mark.parametrize("scale", [1, 2])
def test_results_come_in_rank_order(own_pool, scale):
    assert own_pool.run(2, sum_of_ranks, 3, scale=scale) == [(0, 7 * scale), (1, 7 * scale)]


@SIZES
def test_the_first_error_is_raised_and_the_next_call_works(own_pool, size):
    processes = own_pool.run(size, process_id)
    with pytest.raises(
        RanksFailed, match=r"(?s)^rank 1: KeyError: 'on purpose'.*in fail_on.*\nthen rank 0: "
    ):
        own_pool.run(size, fail_on, 1)
    assert_works(own_pool, size)
    assert own_pool.run(size, process_id) == processes


@pytest.mark.parametrize("how", DEATHS)
@SIZES
def test_a_rank_that_dies_is_named_with_its_last_words(own_pool, size, how):
    _, death, words = DEATHS[how]
    with pytest.raises(RanksFailed) as caught:
        own_pool.run(size, die_on, 1, how)
    first, *others = str(caught.value).split("\nthen ")
    name, _, said = first.partition("\n")
    assert name == f"rank 1 died ({death})" and re.search(words, said)
    assert sorted(other.split()[1] for other in others) == [
        f"{rank}:" for rank in range(size) if rank != 1
    ]
    assert_works(own_pool, size)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("at", ["is_initialized", "destroy_process_group"])
def test_a_rank_that_dies_after_its_answer_is_named(own_pool, at, fails):
    expected = r"^rank 1: KeyError(?s:.*)\nthen rank 1 died" if fails else r"^rank 1 died"
    with pytest.raises(RanksFailed, match=rf"{expected} \(SIGABRT\)") as caught:
        own_pool.run(2, die_after_the_answer, 1, at, fails)
    tensors = [result for result in caught.value.results if result is not None]
    assert [tensor.sum() for tensor in tensors] == ([0] if fails else [0, 1000])
    assert not any(tensor.is_shared() for tensor in tensors)  # with a process that may be gone
    assert_works(own_pool)


def test_a_rank_that_dies_between_calls_is_named(own_pool):
    own_pool.run(2, die_later, 1, 0.1)
    assert own_pool.workers[1].has_ended(60)
    with pytest.raises(
        RanksFailed, match=r"^rank 1 died \(SIGABRT\) after die_later had returned\nFatal Python"
    ):
        own_pool.run(2, sum_of_ranks, 0)
    assert_works(own_pool)


def test_a_death_after_the_last_call_fails_when_the_pool_ends():
    died = pytest.raises(RanksFailed, match=r"^rank 0 died \(SIGABRT\)")
    with died, Pool(start="forkserver") as pool:
        pool.run(1, die_later, 0, 0.1)
        assert pool.workers[0].has_ended(60)


@pytest.mark.parametrize("hung", [[0, 1], [1]])
def test_a_hang_is_reported_after_the_timeout_with_its_stack(own_pool, hung):
    with pytest.raises(
        RanksFailed,
        match=rf"(?s)^ranks \{hung} of 2 did not return in 2 s: a hang.*in sleep_on",
    ):
        own_pool.run(2, sleep_on, hung, timeout=2)
    assert_works(own_pool)


def test_a_rank_that_waits_in_vain_for_one_that_failed_is_not_waited_for(own_pool, monkeypatch):
    monkeypatch.setattr(own_pool, "grace", 0.5)
    with pytest.raises(
        RanksFailed,
        match=r"(?s)^rank 1: KeyError.*\nthen ranks \[0\] of 2 did not return in 0.5 s: a hang$",
    ):
        own_pool.run(2, fail_or_sleep, 1)
    assert_works(own_pool)


BROKEN_MODULES = {
    "import": "raise ImportError('no such module')",
    "init_process_group": """
import torch.distributed as dist
def refuse(*_, **__):
    raise ImportError("no such module")
dist.init_process_group = refuse
""",
}


@pytest.mark.parametrize("what", BROKEN_MODULES)
@SIZES
def test_a_rank_that_fails_before_its_world_is_there(what, size, tmp_path, monkeypatch):
    name = f"broken_{what}"
    only_on_rank_1 = textwrap.indent(BROKEN_MODULES[what], "    ")
    Path(tmp_path, f"{name}.py").write_text(
        f"import os\nif os.environ.get('RANK') == '1':\n{only_on_rank_1}\ndef run(): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Pool(start="forkserver", grace=0.5) as pool:
        with pytest.raises(RanksFailed, match=r"^rank 1: ImportError: no such module"):
            pool.run(size, importlib.import_module(name).run)
        assert_works(pool, size)


@pytest.mark.parametrize(
    "what, message",
    [("lambda", "rank 1: .*pickle.*lambda"), ("unreadable", "rank 1: its result cannot be read")],
)
def test_a_result_that_cannot_be_sent_leaves_the_pool_in_step(own_pool, what, message):
    with pytest.raises(RanksFailed, match=message) as caught:
        own_pool.run(2, return_what_cannot_be_sent, 1, what)
    assert caught.value.results == ["fine", None]
    assert_works(own_pool)


def test_a_call_that_cannot_be_sent_leaves_the_pool_in_step(own_pool):
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        own_pool.run(2, sum_of_ranks, lambda: None)
    assert_works(own_pool)


@pytest.fixture
def interruptible():
    """Raise KeyboardInterrupt for SIGINT, which the background jobs of a shell ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_call_leaves_the_pool_in_step(own_pool, interruptible):
    before = own_pool.run(2, process_id)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        own_pool.run(2, sleep_on, [1])
    assert not any(map(process_is_there, before))
    assert_works(own_pool)


def test_a_forked_child_has_no_part_in_the_conversation(own_pool, tmp_path):
    assert own_pool.run(2, fork, str(tmp_path), True) == ["parent"] * 2
    assert_works(own_pool)


def test_nothing_is_left_behind(tmp_path):
    with Pool(start="forkserver") as pool:
        folder = Path(pool.folder.name)
        processes = pool.run(2, process_id)
        with pytest.raises(RanksFailed, match=r"died \(SIGABRT\)"):
            pool.run(2, fork, str(tmp_path), False)
        with pytest.raises(RanksFailed, match="a hang"):
            pool.run(2, sleep_on, [0, 1], timeout=0.1)
        processes += [path.name for path in tmp_path.iterdir()]
        assert len(processes) == 4
        processes += pool.run(4, process_id)
        names = [path.name for path in folder.iterdir()]
        assert len(names) == 4 and all(name.startswith("stderr-of-rank-") for name in names)
    assert not any(map(process_is_there, processes))
    assert not folder.exists()
    assert not [name for name in os.listdir("/dev/shm") for p in processes if f"_{p}_" in name]


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def test_no_rank_outlives_a_pool_that_is_killed(tmp_path):
    told = tmp_path / "process"
    call = f"Pool().run(1, test_pool.tell_process_and_sleep, {str(told)!r})"
    command = f"import sys; sys.path[:] = {sys.path}; import test_pool; test_pool.{call}"
    with subprocess.Popen([sys.executable, "-c", command]) as process:
        wait_until(lambda: told.exists() and told.read_text(), 100)
        process.kill()
    wait_until(lambda: not process_is_there(told.read_text()), 10)


@pytest.mark.parametrize("case", ["a", "b"])
@run_on_ranks(1, 2)
def test_a_test_runs_on_ranks(tmp_path, case):
    (tmp_path / f"{case}{dist.get_rank()}").touch()
    dist.barrier()
    assert len(list(tmp_path.iterdir())) == dist.get_world_size()


def test_a_test_on_ranks_is_named_by_ranks_and_parameters(request):
    names = [
        item.name for item in request.session.items if "test_a_test_runs_on_ranks" in item.name
    ]
    cases = ["1-a", "1-b", "2-a", "2-b"]
    assert sorted(names) == [f"test_a_test_runs_on_ranks[{case}]" for case in cases]
