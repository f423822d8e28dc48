"""The shm backend where ranks make different calls, and where one cannot reserve its memory."""

import resource

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks
from usage import usage

import tpkernels  # noqa: F401  registers the backend


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
    with pytest.raises(dist.DistBackendError, match="different calls"):
        dist.all_reduce(torch.ones(1))  # the group stays broken
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


@run_on_ranks(2, 4, pool="shm_pool")
def test_all_ranks_are_told_when_one_cannot_reserve_its_memory():
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group(dist.new_group())  # as much as any group leaves behind
    dist.barrier()
    before, _ = usage()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    with pytest.raises(
        RuntimeError,
        match=r"the shm transport cannot start: rank 1: /dev/shm: File too large: it has \d+ "
        rf"bytes free, and the {size} ranks need \d+: make room .*TPKERNELS_TRANSPORT=gloo",
    ):
        dist.new_group()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert usage()[0] == before
    x = torch.ones(10)
    dist.all_reduce(x, group=dist.new_group())
    assert x.tolist() == [size] * 10
