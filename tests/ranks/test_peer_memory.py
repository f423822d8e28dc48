"""Peer memory is opened or refused on every rank alike. Its kernels need GPUs (tests/gpu)."""

import os
import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from pool import run_on_ranks

from tpkernels import peer_memory
from tpkernels.group import Group
from tpkernels.overlap.schedule import choose

DEVICE = torch.device("cpu")


def attempt(built=True, host="here", gpu=None, rendezvous=None, MAX_RANKS=8, **environment):
    """(what was raised or opened, warnings) with the obstacles of one rank put in place."""
    launched, closed, barriers = mock.Mock(), mock.Mock(), []
    fake = SimpleNamespace(
        multicast_ptr=7,
        buffer_ptrs_dev=8,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        barrier=lambda: barriers.append(launched.called),
    )
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda op, key: built),
        mock.patch.object(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(uuid=gpu or f"gpu {dist.get_rank()}"),
        ),
        mock.patch.object(peer_memory, "MAX_RANKS", MAX_RANKS),
        mock.patch.object(peer_memory._C, "close_peer_memory", closed),
        mock.patch.object(peer_memory.socket, "gethostname", lambda: host),
        mock.patch.object(
            peer_memory, "_rendezvous", rendezvous or (lambda pg, device, size: (fake, "buffer"))
        ),
        mock.patch.object(torch.ops.tpkernels, "open_peer_memory", launched),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            found = peer_memory.open_peer_memory(dist.group.WORLD, DEVICE)
        except RuntimeError as error:
            found = error
    # Every rank has opened, and zeroed its flags, before any goes on.
    assert barriers == [True] * launched.called
    closed.assert_called_once_with(dist.group.WORLD.group_name)  # of an earlier world, say
    return found, [str(w.message) for w in caught], launched.call_args


def refusals():
    rank, found = dist.get_rank(), {}

    def fails(pg, device, size):
        if rank == 1:
            raise MemoryError("no more")
        return SimpleNamespace(), None

    for name, arguments in {
        "not built": dict(built=rank != 1),
        "hosts": dict(host=f"host {rank}"),
        "shared": dict(gpu="one"),
        "rendezvous": dict(rendezvous=fails),
        "too many": dict(MAX_RANKS=2),
        "forced off": dict(TPKERNELS_TRANSPORT="nccl"),
        "forced": dict(built=False, TPKERNELS_TRANSPORT="symm"),
    }.items():
        memory, told, launched = attempt(**arguments)
        assert launched is None
        found[name] = (
            type(memory).__name__,
            getattr(memory, "reason", str(memory)),
            told,
            getattr(memory, "max_bytes", 0),
        )
    return found


def test_refused_on_every_rank_with_one_reason(pool):
    results = pool.run(3, refusals)
    reasons = {
        "not built": "rank 1: tpkernels was built without CUDA kernels",
        "hosts": "3 hosts",
        "shared": "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1",
        "rendezvous": "rank 1: torch's symmetric memory failed: MemoryError: no more",
        "too many": "rank 0: the group has 3 ranks, and the kernels take up to 2",
        "forced off": "TPKERNELS_TRANSPORT=nccl",
        "forced": "TPKERNELS_TRANSPORT=symm, but rank 0: tpkernels was built without CUDA kernels: "
        "unset it",
    }
    for rank, found in enumerate(results):
        for name, reason in reasons.items():
            kind, said, told, size = found[name]
            assert (
                kind == ("RuntimeError" if name == "forced" else "PeerMemory")
                and reason in said
                and size == 0
            )
            warned = rank == 0 and not name.startswith("forced")
            assert len(told) == warned and all(
                "go through NCCL" in text and reason in text for text in told
            )


@run_on_ranks(2, 3)
def test_opened_and_chosen_by_size():
    pg = dist.group.WORLD
    assert peer_memory.peer_memory_of(pg) is peer_memory.CLOSED
    memory, told, launched = attempt(gpu="one", TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1")
    assert not told and peer_memory.peer_memory_of(pg) == memory
    name, buffer, peers, multicast, *rest = launched.args
    # The switch is used only where it was asked for.
    assert (name, buffer, peers, multicast) == (
        pg.group_name,
        "buffer",
        8,
        0,
    )
    assert rest == [dist.get_rank(), dist.get_world_size(), memory.max_bytes, memory.one_shot_bytes]
    group = Group(pg, "cuda")
    small, large = memory.max_bytes // 100, memory.max_bytes // 100 + 1
    picks = {
        (overlap, rows): (s.chunks, s.transport)
        for overlap in ("auto", False, 1, 4)
        for rows in (small, large)
        for s in [choose(overlap, rows, 100, group)]
    }
    assert picks.pop((4, small)) == picks.pop((4, large)) == (4, "nccl")
    assert picks.pop(("auto", large)) == (2, "nccl")
    assert {picks[key] for key in picks if key[1] == small} == {(1, "symm")}
    assert {picks[key] for key in picks if key[1] == large} == {(1, "nccl")}
    assert choose("auto", 0, 100, group).transport == "nccl"
    reasons = [choose("auto", rows, 100, group).reason for rows in (1, small)]
    assert "one-shot" in reasons[0] and ("two-shot" in reasons[1]) == (dist.get_world_size() > 2)
    attempt(TPKERNELS_TRANSPORT="nccl")  # opened again, closed this time
    assert choose("auto", small, 100, Group(pg, "cuda")).transport == "nccl"


@pytest.mark.parametrize("max_bytes", [1 << 20, 48])
def test_the_buffer_holds_the_flags_and_two_slots_and_begins_as_zeros(monkeypatch, max_bytes):
    done = []

    def empty(size, dtype, device):
        return torch.ones(size, dtype=dtype, device=device)

    def rendezvous(buffer, group):
        assert not buffer.any() and done == [DEVICE]  # zeros have arrived before a peer looks
        return group

    monkeypatch.setattr(symm_mem, "empty", empty)
    monkeypatch.setattr(symm_mem, "rendezvous", rendezvous)
    monkeypatch.setattr(torch.cuda, "synchronize", done.append)
    group = SimpleNamespace(group_name="a group")
    handle, buffer = peer_memory._rendezvous(group, DEVICE, max_bytes)
    assert handle == "a group" and buffer.nbytes == 36 * 8 * 8 + 2 * max_bytes
