"""A small or full /dev/shm: an error with the bytes, or gloo with a word, and nothing left behind.

One process runs all scenarios with a /dev/shm of its own, as a mount namespace gives it.
"""

import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pool import Pool, RanksFailed
from usage import usage

import tpkernels as tpk
import tpkernels.functional as tpf

SIZES = (2, 4)
LEAST = 135168  # bytes of a rank: a header and two slots of 64 KB
UNSHARE = ["unshare", "--map-root-user", "--mount"]


def free_bytes():
    room = os.statvfs("/dev/shm")
    return room.f_bavail * room.f_frsize


def assert_all_reduces(group, numel=1000):
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.full((numel,), float(rank))
    assert (tpk.all_reduce_(x, group) == sum(range(size))).all()


def assert_no_room(size):
    """Assert that no group of `size` ranks can be made now, and that the attempt leaves nothing."""
    before = usage()[0], free_bytes()
    with pytest.raises(
        RuntimeError,
        match=rf"rank \d: /dev/shm: No space left on device: it has \d+ bytes free, and the {size} "
        rf"ranks need {size * LEAST}: make room .*shm-size.*TPKERNELS_TRANSPORT=gloo",
    ):
        dist.new_group(backend="shm")
    dist.barrier()
    assert (usage()[0], free_bytes()) == before


def a_group_by_name():
    dist.destroy_process_group(dist.new_group())
    dist.barrier()
    assert_no_room(dist.get_world_size())


def mesh_and_warnings(forced=""):
    size = dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setenv("TPKERNELS_TRANSPORT", forced)
        mesh = tpk.init_mesh(size, device="cpu")
    assert_all_reduces(mesh["tp"], 300_000)
    return dist.get_backend(mesh["tp"].get_group()), [str(w.message) for w in caught]


def a_disk_that_fills_up():
    """Fill /dev/shm when the group is there, whose memory it has: no SIGBUS, and right results."""
    size, full = dist.get_world_size(), Path("/dev/shm/full")
    group = dist.new_group(backend="shm")
    dist.barrier()
    if dist.get_rank() == 0:
        with full.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes())
    dist.barrier()
    assert free_bytes() == 0
    assert_all_reduces(group, 5 << 20)  # of all of both slots
    assert_no_room(size)
    assert_all_reduces(group)
    if dist.get_rank() == 0:
        full.unlink()
    dist.barrier()
    assert_all_reduces(dist.new_group(backend="shm"))


def groups_by_turns(times):
    """Make and destroy groups."""
    before = None
    for number in range(times):
        group = dist.new_group(backend="shm")
        weight = torch.full((4, 2), 0.5)
        y = tpf.row_parallel_linear(torch.full((3, 2), float(number)), weight, group=group)
        assert (y == number * dist.get_world_size()).all()
        dist.destroy_process_group(group)
        del group
        if number == times // 10:
            dist.barrier()
            before = usage()
    dist.barrier()
    (counts, megabytes), (counts_before, megabytes_before) = usage(), before
    assert counts == counts_before and megabytes < megabytes_before + 20
