"""Symmetric-memory all-reduces over the GPUs' peer memory: open it for a group, or say why not."""

from __future__ import annotations

import os
import socket
import warnings
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from . import _C
from .process_group import gather_objects, is_alive
from .transport import forced_transport

# Up to here the kernels' latency beats NCCL's ring; beyond, its bandwidth. One-shot reads n - 1
# buffers where two-shot reads two: it pays for small all-reduces, the less the more ranks.
# Thresholds published for vLLM and TensorRT-LLM; not measured here.
MAX_BYTES = 8 << 20
ONE_SHOT_BYTES = {2: MAX_BYTES, 3: 512 << 10, 4: 512 << 10}  # by ranks; otherwise:
ONE_SHOT_BYTES_MORE_RANKS = 256 << 10
MAX_RANKS = 8


@dataclass(frozen=True)
class PeerMemory:
    """The peer-memory path of a group's small all-reduces.

    Attributes:
        max_bytes: the largest all-reduce that it takes; 0 where it is closed.
        one_shot_bytes: the largest all-reduce that the one-shot kernel takes.
        reason: why it is open or closed.
    """

    max_bytes: int
    one_shot_bytes: int
    reason: str


CLOSED = PeerMemory(0, 0, "the group was not made by tpk.init_mesh on GPUs")
_opened: dict[ProcessGroup, PeerMemory] = {}


def peer_memory_of(pg: ProcessGroup) -> PeerMemory:
    """Return the peer memory that was opened for `pg`, or CLOSED."""
    return _opened.get(pg, CLOSED)


def open_peer_memory(
    pg: ProcessGroup,
    device: torch.device,
    max_bytes: int = MAX_BYTES,
    multicast: bool = False,
) -> PeerMemory:
    """Give `pg` symmetric buffers and send its small all-reduces through them.

    Every rank opens them or none does: each says why it cannot, and all hear it.

    Collective: every rank of the group must call it, before the group's first op.

    Args:
        pg: the group.
        device: the caller's GPU.
        max_bytes: the largest all-reduce that goes this way.
        multicast: let the NVLink switch sum (NVLS, from sm_90 on). Ranks still agree to the bit,
            but two runs may not.

    Raises:
        RuntimeError: TPKERNELS_TRANSPORT=symm, and peer memory cannot be had.
    """
    _C.close_peer_memory(pg.group_name)  # a group of an earlier world may have had the name
    for old in list(_opened):
        if old.group_name == pg.group_name or not is_alive(old):
            del _opened[old]
    forced = forced_transport()
    handle = buffer = None
    unavailable_reason = _unavailable_reason(pg, device, forced)
    if unavailable_reason is None:
        own_reason = None
        try:
            handle, buffer = _rendezvous(pg, device, max_bytes)
        except Exception as error:  # the driver's and the allocator's own, of many types
            own_reason = f"torch's symmetric memory failed: {type(error).__name__}: {error}"
        unavailable_reason = _first_reason(gather_objects(pg, own_reason))
    if unavailable_reason is None:
        assert handle is not None
        one_shot_bytes = ONE_SHOT_BYTES.get(pg.size(), ONE_SHOT_BYTES_MORE_RANKS)
        opened = PeerMemory(max_bytes, min(max_bytes, one_shot_bytes), "symmetric memory over P2P")
        torch.ops.tpkernels.open_peer_memory(
            pg.group_name,
            buffer,
            handle.buffer_ptrs_dev,
            handle.multicast_ptr if multicast else 0,
            handle.rank,
            handle.world_size,
            opened.max_bytes,
            opened.one_shot_bytes,
        )
        handle.barrier()  # nobody launches before all have zeroed their flags
    elif forced == "symm":
        raise RuntimeError(
            f"TPKERNELS_TRANSPORT=symm, but {unavailable_reason}: unset it to take NCCL"
        )
    else:
        if pg.rank() == 0 and forced is None:
            warnings.warn(
                f"small all-reduces of {pg.size()} ranks go through NCCL: {unavailable_reason}",
                stacklevel=3,
            )
        opened = PeerMemory(0, 0, unavailable_reason)
    _opened[pg] = opened
    return opened


def _rendezvous(pg: ProcessGroup, device: torch.device, max_bytes: int):
    # Imported late: `import tpkernels` does not pay for what only GPUs use.
    import torch.distributed._symmetric_memory as symm_mem

    size = _C.peer_buffer_bytes(max_bytes)
    buffer = symm_mem.empty(size, dtype=torch.uint8, device=device).zero_()
    torch.cuda.synchronize(device)
    return symm_mem.rendezvous(buffer, pg.group_name), buffer


def _unavailable_reason(pg: ProcessGroup, device: torch.device, forced: str | None) -> str | None:
    """Return why any of the ranks cannot open peer memory, the same on all, or None."""
    own_reason = None
    if forced == "nccl":
        own_reason = "TPKERNELS_TRANSPORT=nccl"
    elif pg.size() > MAX_RANKS:
        own_reason = f"the group has {pg.size()} ranks, and the kernels take up to {MAX_RANKS}"
    elif not torch._C._dispatch_has_kernel_for_dispatch_key("tpkernels::open_peer_memory", "CUDA"):
        own_reason = "tpkernels was built without CUDA kernels"
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    reasons, hosts, uuids = zip(
        *gather_objects(pg, (own_reason, socket.gethostname(), uuid)), strict=True
    )
    if (reason := _first_reason(reasons)) is not None:
        return reason
    if len(set(hosts)) > 1:
        return f"the ranks are on {len(set(hosts))} hosts, and peer memory is within one"
    allows_sharing = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
    if len(set(uuids)) < pg.size() and not allows_sharing:
        return "ranks share a GPU (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 allows it)"
    return None


def _first_reason(reasons) -> str | None:
    for rank, reason in enumerate(reasons):
        if reason is not None:
            return f"rank {rank}: {reason}"
    return None
