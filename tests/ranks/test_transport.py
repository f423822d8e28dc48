"""Which transport a group takes: gloo or shared memory, and the reason."""

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk
from tpkernels import group as groups
from tpkernels import transport

SMALL = """
import os, sys, warnings, multiprocessing as mp
import torch.distributed as dist
import tpkernels as tpk, torch
def main(rank, store, mode):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            backend = "cpu:shm" if mode == "explicit" else "gloo"
            store = dist.FileStore(store, 2)
            dist.init_process_group(backend, store=store, rank=rank, world_size=2)
            mesh = tpk.init_mesh(2, device="cpu")
            x = torch.ones(300000)
            tpk.all_reduce_(x, mesh["tp"])
            backend = dist.get_backend(mesh["tp"].get_group())
            said = f"ran on {backend} {x.unique().tolist()} {[str(w.message) for w in caught]}"
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
    """Return the lines that two ranks print with a /dev/shm of `kilobytes`."""
    can = subprocess.run(["unshare", "-m", "true"], capture_output=True)
    if can.returncode:
        pytest.skip(
            "needs root (or user namespaces) for a /dev/shm of its own: unshare -m is refused"
        )
    script = tmp_path / "small.py"
    script.write_text(SMALL)
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs /dev/shm"
    command = f"{mount} && exec {sys.executable} {script} {tmp_path / mode} {mode}"
    run = subprocess.run(
        ["unshare", "-m", "sh", "-c", command],
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
            r"/dev/shm: No space left on device: it has \d+ bytes free, "
            r"and the 2 ranks need 270336",
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


def two_hosts(*rows):
    return [None, "ranks 0 to 2 are on 2 hosts"]


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
            assert layer.group.transport in layer.explain(10)
        patch.setenv("TPKERNELS_TRANSPORT", "rdma")
        with pytest.raises(ValueError, match="TPKERNELS_TRANSPORT=rdma"):
            tpk.init_mesh(2, 2, device="cpu")
        patch.setenv("TPKERNELS_TRANSPORT", "shm")
        patch.setattr(transport, "shm_unavailable_reasons", two_hosts)
        with pytest.raises(
            RuntimeError, match="TPKERNELS_TRANSPORT=shm, but ranks 0 to 2 are on 2 hosts"
        ):
            tpk.init_mesh(2, 2, device="cpu")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patch.setattr(transport, "shm_unavailable_reasons", two_hosts)
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
        assert seen[None] == seen["shm"] == ["shm"] * 3 and seen["gloo"] == ["gloo"] * 3
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
