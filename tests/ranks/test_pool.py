"""The pool of ranks that the other tests run on: results, failures, deaths and hangs."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from pool import Pool, run_on_ranks


def sum_of_ranks(offset, *, scale=1):
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), scale * total.item()


def fail_on(rank):
    if dist.get_rank() == rank:
        raise KeyError("on purpose")
    dist.barrier()


def abort_on(rank):
    if dist.get_rank() == rank:
        os.abort()
    dist.barrier()


def sleep():
    time.sleep(100)


@pytest.fixture(scope="module")
def own_pool():
    with Pool() as pool:
        yield pool


@pytest.mark.parametrize("scale", [1, 2])
def test_results_come_in_rank_order(own_pool, scale):
    assert own_pool.run(2, sum_of_ranks, 3, scale=scale) == [(0, 7 * scale), (1, 7 * scale)]


def test_the_first_error_is_raised_and_the_next_call_works(own_pool):
    with pytest.raises(AssertionError, match=r"(?s)^rank 1: KeyError: 'on purpose'.*in fail_on"):
        own_pool.run(2, fail_on, 1)
    assert own_pool.run(2, sum_of_ranks, 0) == [(0, 1), (1, 1)]


def test_a_rank_that_aborts_is_named_and_the_next_call_works(own_pool):
    with pytest.raises(AssertionError, match=r"^rank 1 died, exit code -6$"):
        own_pool.run(2, abort_on, 1)
    assert own_pool.run(2, sum_of_ranks, 0) == [(0, 1), (1, 1)]


def test_a_rank_that_died_between_calls_is_named(own_pool):
    own_pool.run(2, sum_of_ranks, 0)
    process, _ = own_pool.workers[1]
    process.kill()
    process.join()
    with pytest.raises(AssertionError, match=r"^rank 1 died, exit code -9$"):
        own_pool.run(2, sum_of_ranks, 0)


def test_a_hang_is_reported_after_the_timeout(own_pool):
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 did not return in 0.1 s"):
        own_pool.run(2, sleep, timeout=0.1)
    assert own_pool.workers == []


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
