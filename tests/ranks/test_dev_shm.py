"""A /dev/shm that is small or full, and what groups leave in it and in their processes.

One process runs all scenarios in a mount namespace, where it has a /dev/shm of its own.
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

LEAST = 135168  # bytes of a rank: a header and two slots of 64 KB
TOO_LITTLE = 128  # KB of /dev/shm for each rank


def free_bytes():
    room = os.statvfs("/dev/shm")
    return room.f_bavail * room.f_frsize


def assert_sums(group, numel=1000):
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.full((numel,), float(rank))
    assert (tpk.all_reduce_(x, group) == sum(range(size))).all()


def usage_of_all():
    """Return what every rank holds at a moment at which none makes or destroys a group."""
    dist.barrier()
    counts, megabytes = usage()
    counts["free bytes"] = free_bytes()
    dist.barrier()
    return counts, megabytes


def refused_group():
    """Ask for a group that has no room, which leaves nothing behind."""
    size = dist.get_world_size()
    dist.destroy_process_group(dist.new_group())
    before, _ = usage_of_all()
    with pytest.raises(
        RuntimeError,
        match=r"rank \d: /dev/shm: No space left on device: it has \d+ bytes free, and the "
        rf"{size} ranks need {size * LEAST}: make room .*shm-size.*TPKERNELS_TRANSPORT=gloo",
    ):
        dist.new_group(backend="shm")
    assert usage_of_all()[0] == before
    assert_sums(dist.group.WORLD)


def refused_mesh():
    size = dist.get_world_size()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPKERNELS_TRANSPORT", "shm")
        with pytest.raises(
            RuntimeError,
            match=r"TPKERNELS_TRANSPORT=shm, but /dev/shm has \d+,\d+ bytes free, "
            f"and the groups need {size * LEAST:,} at the least: unset it to take gloo there",
        ):
            tpk.init_mesh(size, device="cpu")


def mesh_on(backend, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mesh = tpk.init_mesh(dist.get_world_size(), device="cpu")
    shown = [w.filename for w in caught if "/dev/shm has" in str(w.message)]
    assert shown == [__file__] * (warned and dist.get_rank() == 0)
    assert dist.get_backend(mesh["tp"].get_group()) == backend
    assert_sums(mesh["tp"], 300_000)


def full_later():
    """Fill /dev/shm under a group, which keeps its memory: no SIGBUS, and right results."""
    full = Path("/dev/shm/full")
    group = dist.new_group(backend="shm")
    if dist.get_rank() == 0:
        with full.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes())
    dist.barrier()
    assert free_bytes() == 0
    assert_sums(group, 5 << 20)  # all of both slots
    refused_group()
    assert_sums(group)
    full.unlink(missing_ok=True)
    dist.barrier()
    assert_sums(dist.new_group(backend="shm"))


def start_world_on_tcp():
    """Replace the world by one whose store answers at once; the pool's looks into a file."""
    rank, size, port = dist.get_rank(), dist.get_world_size(), [0]
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = [store.port]
    dist.broadcast_object_list(port)
    if rank > 0:
        store = dist.TCPStore("127.0.0.1", port[0])
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return store


def assert_nothing_grows(times, turn):
    """Call turn(0), turn(1), ..., and compare what the ranks hold early and late."""
    for number in range(times):
        turn(number)
        if number == times // 10:
            counts, megabytes = usage_of_all()
    later, megabytes_later = usage_of_all()
    assert later == counts
    assert megabytes_later < megabytes + 20


def make_and_destroy_groups(backend, times):
    size, weight = dist.get_world_size(), torch.full((4, 2), 0.5)
    start_world_on_tcp()

    def turn(number):
        group = dist.new_group(backend=backend)
        y = tpf.row_parallel_linear(torch.full((3, 2), float(number)), weight, group=group)
        assert (y == number * size).all()
        dist.destroy_process_group(group)

    assert_nothing_grows(times, turn)


def make_and_destroy_worlds(backend, times):
    rank, size = dist.get_rank(), dist.get_world_size()
    root = start_world_on_tcp()

    def turn(number):
        dist.destroy_process_group()
        store = dist.PrefixStore(f"world{number}", root)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        assert_sums(dist.group.WORLD)

    assert_nothing_grows(times, turn)


def refused_world(pool, size):
    message = rf"cannot start: rank \d: /dev/shm: No space left.* {size} ranks need {size * LEAST}"
    with Pool(backend="shm", start="forkserver") as pool, pytest.raises(RanksFailed, match=message):
        pool.run(size, usage)


def on_ranks(function, *args):
    return lambda pool, size: pool.run(size, function, *args)


def groups(backend, most):
    """Return a scenario of `most` groups on 2 ranks, and of fewer on 4."""
    return lambda pool, size: pool.run(size, make_and_destroy_groups, backend, most * 8 // size**3)


# A scenario has KB of /dev/shm for each rank, and a function of a pool and the number of ranks.
SCENARIOS = {
    "a group by name is refused": (TOO_LITTLE, on_ranks(refused_group)),
    "a world is refused": (TOO_LITTLE, refused_world),
    "a mesh falls back to gloo": (TOO_LITTLE, on_ranks(mesh_on, "gloo", True)),
    "a mesh that must have shm is refused": (TOO_LITTLE, on_ranks(refused_mesh)),
    "a small one is made do with": (512, on_ranks(mesh_on, "shm", False)),
    "one that is full later does no harm": (20 << 10, on_ranks(full_later)),
    "groups leave nothing": (1 << 10, groups("shm", 1000)),
    "groups on gloo leave nothing": (1 << 10, groups("gloo", 100)),
    "worlds leave nothing": (1 << 10, on_ranks(make_and_destroy_worlds, "shm", 24)),
    "worlds on gloo leave nothing": (1 << 10, on_ranks(make_and_destroy_worlds, "gloo", 24)),
}


def main():
    """Print the error of every scenario, or null, as JSON."""
    errors = {}
    with Pool(start="forkserver") as pool:
        for name, (kilobytes, scenario) in SCENARIOS.items():
            for size in (2, 4):
                # It covers the scenario before, and whatever that has left.
                mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes * size}k", "tmpfs"]
                subprocess.run([*mount, "/dev/shm"], check=True)
                error = None
                try:
                    scenario(pool, size)
                    assert free_bytes() == kilobytes * size * 1024
                except (Exception, pytest.fail.Exception):
                    error = traceback.format_exc()
                errors[f"{name}, {size}"] = error
    print(json.dumps(errors))


@pytest.fixture(scope="module")
def errors():
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs a mount namespace for a /dev/shm of its own: unshare is refused")
    code = f"import sys; sys.path[:] = {sys.path}; import test_dev_shm; test_dev_shm.main()"
    ran = subprocess.run(
        [*unshare, sys.executable, "-c", code], capture_output=True, text=True, timeout=500
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", SCENARIOS)
def test_dev_shm(errors, name, size):
    error = errors[f"{name}, {size}"]
    assert error is None, error
