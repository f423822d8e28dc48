"""The c10d backend "shm": ranks of one host share memory. Registered when tpkernels is imported: `init_process_group("cpu:shm")`."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore

from . import _C
from .peer_memory import gather_objects

TRANSPORTS = ("gloo", "shm", "nccl", "symm")


def forced_transport() -> str | None:
    """TPKERNELS_TRANSPORT.

    Raises:
        ValueError: it is none of the transports.
    """
    transport = os.environ.get("TPKERNELS_TRANSPORT") or None
    if transport not in (None, *TRANSPORTS):
        raise ValueError(
            f"TPKERNELS_TRANSPORT={transport} is no transport: set one of {', '.join(TRANSPORTS)}, or unset it"
        )
    return transport


def _create(options, _):
    """The backend of one group; all its ranks call this. It raises on all of them, or on none (csrc/shm)."""
    rank, size = options.group_rank, options.group_size
    gloo = dist.ProcessGroupGloo(PrefixStore("gloo", options.store), rank, size, options.timeout)
    if forced_transport() == "gloo":
        if rank == 0:
            warnings.warn(
                "TPKERNELS_TRANSPORT=gloo: a group that was asked for with shm runs on gloo",
                stacklevel=2,
            )
        return gloo
    store = PrefixStore("shm", options.store)
    return _C.shm_backend(
        store, rank, size, options.timeout.total_seconds(), options.group_id, gloo
    )


dist.Backend.register_backend("shm", _create, extended_api=True, devices=["cpu"])


def shm_obstacles(*groups: torch.Tensor) -> list[str | None]:
    """What keeps each kind of groups (a tensor [groups, size] of global ranks) from sharing memory; the same on every rank.

    Every rank of the default group must call it.
    """
    places = gather_objects(dist.group.WORLD, (_C.shm_host(), _C.shm_free_bytes()))
    obstacles: list[str | None] = []
    taken = dict.fromkeys((host for host, _ in places), 0)  # by the groups before
    for rows in groups:
        obstacle = None
        wanted = dict(taken)
        for ranks in rows.tolist():
            hosts = {places[rank][0] for rank in ranks}
            if len(hosts) > 1:
                obstacle = f"ranks {ranks[0]} to {ranks[-1]} are on {len(hosts)} hosts (or in containers, or network namespaces, of their own)"
                break
            wanted[hosts.pop()] += _C.shm_least_bytes(len(ranks)) if len(ranks) > 1 else 0
        if obstacle is None:
            for host, free in places:
                if wanted[host] > free:
                    obstacle = f"/dev/shm has {free:,} bytes free, and the groups need {wanted[host]:,} at the least"
                    break
        if obstacle is None:
            taken = wanted
        obstacles.append(obstacle)
    return obstacles
