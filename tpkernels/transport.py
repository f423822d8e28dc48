"""Transports: the choice that TPKERNELS_TRANSPORT forces, and the c10d backend `shm`.

`shm` lets ranks of one host share memory. `import tpkernels` registers it, so that
`init_process_group("cpu:shm")` works.
"""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed import ProcessGroup

from . import _C
from .process_group import default_group, gather_objects

TRANSPORTS = ("gloo", "shm", "nccl", "symm")


def forced_transport() -> str | None:
    """Return the transport that the environment variable TPKERNELS_TRANSPORT names, or None.

    Raises:
        ValueError: it is none of the transports.
    """
    transport = os.environ.get("TPKERNELS_TRANSPORT") or None
    if transport not in (None, *TRANSPORTS):
        raise ValueError(
            f"TPKERNELS_TRANSPORT={transport} is no transport: "
            f"set one of {', '.join(TRANSPORTS)}, or unset it"
        )
    return transport


def transport_of(pg: ProcessGroup, device_type: str) -> str:
    """Return what carries the collectives of `pg`: "nccl", "shm" or "gloo"."""
    if device_type == "cuda":
        return "nccl"
    # get_backend returns what was asked for, and TPKERNELS_TRANSPORT=gloo puts that on gloo.
    asked_for_shm = "shm" in dist.get_backend(pg)
    if asked_for_shm and pg._get_backend(torch.device("cpu")).name() == "shm":
        return "shm"
    return "gloo"


def choose_cpu_backends(*groups: torch.Tensor) -> list[str]:
    """Choose shm for groups whose ranks share a host, and gloo for others.

    Collective: every rank of the default group must call it. All get the same answer.

    Args:
        groups: [n, size] each, global ranks: one row is one group.

    Returns:
        A backend for each of `groups`.

    Raises:
        RuntimeError: TPKERNELS_TRANSPORT=shm, and some ranks cannot share memory.
    """
    forced = forced_transport()
    if forced == "gloo":
        return ["gloo"] * len(groups)
    backends = []
    for rows, unavailable_reason in zip(groups, shm_unavailable_reasons(*groups), strict=True):
        size = rows.shape[1]
        if size == 1 or unavailable_reason is not None:
            backends.append("gloo")
        else:
            backends.append("shm")
        if size == 1 or unavailable_reason is None:
            continue
        if forced == "shm":
            raise RuntimeError(
                f"TPKERNELS_TRANSPORT=shm, but {unavailable_reason}: unset it to take gloo there"
            )
        if dist.get_rank() == 0:
            warnings.warn(
                f"groups of {size} ranks run on gloo, not on shared memory: {unavailable_reason}",
                stacklevel=3,
            )
    return backends


def shm_unavailable_reasons(*groups: torch.Tensor) -> list[str | None]:
    """Return why each set of groups cannot use shm, or None where it can.

    Collective: every rank of the default group must call it. All get the same answer.

    Args:
        groups: [n, size] each, global ranks: one row is one group.
    """
    places = gather_objects(default_group(), (_C.shm_host(), _C.shm_free_bytes()))
    reasons: list[str | None] = []
    taken_bytes = dict.fromkeys((host for host, _ in places), 0)  # by the sets of groups before
    for rows in groups:
        reason = None
        wanted_bytes = dict(taken_bytes)
        for ranks in rows.tolist():
            hosts = {places[rank][0] for rank in ranks}
            if len(hosts) > 1:
                reason = (
                    f"ranks {ranks[0]} to {ranks[-1]} are on {len(hosts)} hosts "
                    "(or in containers, or network namespaces, of their own)"
                )
                break
            if len(ranks) > 1:
                wanted_bytes[hosts.pop()] += _C.shm_least_bytes(len(ranks))
        if reason is None:
            reason = _too_little_memory(places, wanted_bytes)
        if reason is None:
            taken_bytes = wanted_bytes
        reasons.append(reason)
    return reasons


def _too_little_memory(places: list[tuple[str, int]], wanted: dict[str, int]) -> str | None:
    for host, free_bytes in places:
        if wanted[host] > free_bytes:
            return (
                f"/dev/shm has {free_bytes:,} bytes free, "
                f"and the groups need {wanted[host]:,} at the least"
            )
    return None


def _create_shm_backend(options, _):
    """Create the backend of one group.

    Collective: every rank of the group must call it. It raises on all of them or on none.
    """
    rank, size = options.group_rank, options.group_size
    gloo_store = PrefixStore("gloo", options.store)
    gloo = dist.ProcessGroupGloo(gloo_store, rank, size, options.timeout)
    if forced_transport() == "gloo":
        if rank == 0:
            warnings.warn(
                "TPKERNELS_TRANSPORT=gloo: a group that was asked for with shm runs on gloo",
                stacklevel=2,
            )
        return gloo
    store = PrefixStore("shm", options.store)
    seconds = options.timeout.total_seconds()
    return _C.shm_backend(store, rank, size, seconds, options.group_id, gloo)


dist.Backend.register_backend("shm", _create_shm_backend, extended_api=True, devices=["cpu"])
