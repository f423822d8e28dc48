"""All-reduces of small messages over the GPUs' peer memory: opened when `init_mesh` makes a group, or refused for a reason that is told."""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from . import _C

# Up to here the kernels' latency beats NCCL's ring; beyond, its bandwidth. One-shot reads n - 1 buffers where two-shot reads two:
# it pays for small messages, the less the more ranks. vLLM's and TensorRT-LLM's published thresholds, not measured here.
MAX_BYTES = 8 << 20
ONE_SHOT_BYTES = {2: MAX_BYTES, 3: 512 << 10, 4: 512 << 10}  # by ranks; otherwise:
ONE_SHOT_BYTES_MORE_RANKS = 256 << 10
MAX_RANKS = 8


@dataclass(frozen=True)
class PeerMemory:
    """What a group's all-reduces of up to `max_bytes` run on (0: none), and why."""

    max_bytes: int
    one_shot_bytes: int
    reason: str


CLOSED = PeerMemory(0, 0, "the group was not made by tpk.init_mesh on GPUs")
_opened: dict[ProcessGroup, PeerMemory] = {}


def peer_memory(pg: ProcessGroup) -> PeerMemory:
    return _opened.get(pg, CLOSED)


def open_peer_memory(
    pg: ProcessGroup, device: torch.device, max_bytes: int = MAX_BYTES, multicast: bool = False
) -> PeerMemory:
    """Gives `pg` symmetric buffers and sends its small all-reduces through them. All its ranks call it, before its first op.

    Every rank opens them or none does: each says what stands in its way, and all hear it.

    Args:
        multicast: let the NVLink switch sum (NVLS, from sm_90 on): ranks still agree to the bit, but two runs may not.

    Raises:
        RuntimeError: TPKERNELS_TRANSPORT=symm, and peer memory cannot be had.
    """
    _C.close_peer_memory(pg.group_name)  # of an earlier world's group of that name
    for old in [
        old
        for old in _opened
        if old.group_name == pg.group_name or old not in dist.distributed_c10d._world.pg_map
    ]:
        del _opened[old]
    transport = os.environ.get("TPKERNELS_TRANSPORT")
    obstacle = _obstacle(pg, device, "TPKERNELS_TRANSPORT=nccl" if transport == "nccl" else None)
    handle = buffer = None
    size = pg.size()
    one_shot = min(max_bytes, ONE_SHOT_BYTES.get(size, ONE_SHOT_BYTES_MORE_RANKS))
    if obstacle is None:
        try:
            handle, buffer = _rendezvous(pg, device, max_bytes)
        except Exception as error:  # the driver's and the allocator's own, of many types
            obstacle = f"torch's symmetric memory failed: {type(error).__name__}: {error}"
        obstacle = _first_obstacle(pg, obstacle)
    if obstacle is None:
        switch = handle.multicast_ptr if multicast else 0
        torch.ops.tpkernels.open_peer_memory(
            pg.group_name,
            buffer,
            handle.buffer_ptrs_dev,
            switch,
            handle.rank,
            handle.world_size,
            max_bytes,
            one_shot,
        )
        handle.barrier()  # nobody launches before all have zeroed their flags
        opened = PeerMemory(max_bytes, one_shot, "symmetric memory over P2P")
    elif transport == "symm":
        raise RuntimeError(f"TPKERNELS_TRANSPORT=symm, but {obstacle}: unset it to take NCCL")
    else:
        if pg.rank() == 0 and transport is None:
            warnings.warn(
                f"small all-reduces of {size} ranks go through NCCL: {obstacle}", stacklevel=3
            )
        opened = PeerMemory(0, 0, obstacle)
    _opened[pg] = opened
    return opened


def _rendezvous(pg: ProcessGroup, device: torch.device, max_bytes: int):
    import torch.distributed._symmetric_memory as symm_mem

    buffer = symm_mem.empty(
        _C.peer_buffer_bytes(max_bytes), dtype=torch.uint8, device=device
    ).zero_()
    torch.cuda.synchronize(device)
    return symm_mem.rendezvous(buffer, pg.group_name), buffer


def _obstacle(pg: ProcessGroup, device: torch.device, mine: str | None) -> str | None:
    """What keeps any of the ranks from opening peer memory, the same answer on all of them."""
    if mine is None and pg.size() > MAX_RANKS:
        mine = f"the group has {pg.size()} ranks, and the kernels take up to {MAX_RANKS}"
    if mine is None and not torch._C._dispatch_has_kernel_for_dispatch_key(
        "tpkernels::open_peer_memory", "CUDA"
    ):
        mine = "tpkernels was built without CUDA kernels"
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    places = gather_objects(pg, (mine, socket.gethostname(), uuid))
    for rank, (obstacle, _, _) in enumerate(places):
        if obstacle is not None:
            return f"rank {rank}: {obstacle}"
    if len({host for _, host, _ in places}) > 1:
        return f"the ranks are on {len({host for _, host, _ in places})} hosts, and peer memory is within one"
    shared = len({uuid for _, _, uuid in places}) < pg.size()
    if shared and os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") != "1":
        return "ranks share a GPU (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 allows it)"
    return None


def _first_obstacle(pg: ProcessGroup, mine: str | None) -> str | None:
    found = [
        f"rank {rank}: {obstacle}"
        for rank, obstacle in enumerate(gather_objects(pg, mine))
        if obstacle is not None
    ]
    return found[0] if found else None


def gather_objects(pg: ProcessGroup, value) -> list:
    values: list = [None] * pg.size()
    dist.all_gather_object(values, value, group=pg)
    return values
