"""init_mesh: the ("dp", "tp") mesh, its groups and what was tuned for them."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from tpkernels_planner import Layout, LayoutChoice

from .group import Group, register_chunked_group, register_mesh
from .kernels import registration
from .overlap import calibration_cache
from .peer_memory import open_peer_memory
from .transport import choose_cpu_backends

# NCCL's share of a GPU while a GEMM runs beside it. Published advice is "few"; not measured here.
CHUNKED_NCCL_CTAS = 16


def init_mesh(
    tp: int | Layout | LayoutChoice,
    dp: int = 1,
    *,
    device: str | None = None,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> DeviceMesh:
    """Make a DeviceMesh ("dp", "tp") of dp * tp ranks.

    tp is innermost, so that the ranks of a TP group are neighbours on one node. The default
    process group is started from torchrun's variables if there is none; one that exists stays as
    it is. The mesh's own groups are new:

    - On GPUs they run on NCCL. Chunked schedules get a second communicator of high stream priority
      and few CTAs. Small all-reduces go through the GPUs' peer memory where they have access to
      it; where not, a warning says why. The current device is set from LOCAL_RANK.
    - On CPUs ranks of one host share memory, others use gloo.

    The TP ranks take what `tpk.tune` saved on their first rank's machine for such a group. A
    warning says so if they are on several hosts and nothing was saved.

    Collective: every rank of the job must call it.

    Args:
        tp: ranks of a tensor-parallel group, or what `tpk.plan` returned, or a planner's `Layout`;
            these two set dp as well.
        dp: data-parallel replicas. tp * dp must be the number of ranks.
        device: "cuda" or "cpu"; None takes CUDA if it is there.
        backend: c10d backend of the mesh's groups, in place of the choice above.
        timeout: of the groups' collectives; None takes torch's.

    Returns:
        The mesh; `mesh["tp"]` is the group that layers take.

    Raises:
        ValueError: a size below 1, a layout with a pipeline, tp * dp is not the number of ranks,
            or no torchrun variables where several ranks are asked for.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> mesh["tp"].size()
        1
    """
    tp, dp = _sizes(tp, dp)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    _start_default_group(tp, dp, device, timeout)

    ranks = torch.arange(tp * dp).view(dp, tp)
    if backend is not None:
        tp_backend = dp_backend = backend
    elif device == "cuda":
        tp_backend = dp_backend = "cpu:gloo,cuda:nccl"
    else:
        tp_backend, dp_backend = choose_cpu_backends(ranks, ranks.t())
    tp_group = _new_groups(ranks, tp_backend, timeout)
    dp_group = _new_groups(ranks.t(), dp_backend, timeout)
    if device == "cuda" and "nccl" in tp_backend and tp > 1:
        chunked = _new_groups(ranks, tp_backend, timeout, _chunked_nccl_options())
        register_chunked_group(tp_group, chunked)
        open_peer_memory(tp_group, torch.device("cuda", torch.cuda.current_device()))
    mesh = DeviceMesh.from_group([dp_group, tp_group], device, ranks, mesh_dim_names=("dp", "tp"))
    if device == "cuda" and registration.available():
        from .kernels import tuning  # imports Triton

        tuning.load(tp_group)
    if tp > 1:
        calibration_cache.load(Group(tp_group, device))
    register_mesh(mesh, tp_group)
    return mesh


def _sizes(tp: int | Layout | LayoutChoice, dp: int) -> tuple[int, int]:
    """Return tp and dp as checked ints."""
    if isinstance(tp, (Layout, LayoutChoice)):
        if tp.pp != 1:
            raise ValueError(
                f"the layout has a pipeline, pp={tp.pp}, which tpkernels does not run: "
                "plan with max_pp=1"
            )
        tp, dp = tp.tp, tp.dp
    for name, size in (("tp", tp), ("dp", dp)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
    return tp, dp


def _start_default_group(tp: int, dp: int, device: str, timeout: timedelta | None) -> None:
    """Start the default group if there is none; raise unless the job has tp * dp ranks."""
    is_started = dist.is_initialized()
    if is_started:
        world = dist.get_world_size()
    else:
        world = int(os.environ.get("WORLD_SIZE", 1))
    if tp * dp != world:
        hint = ""
        if not is_started and "WORLD_SIZE" not in os.environ:
            hint = f": start it with `torchrun --nproc-per-node {tp * dp}`"
        raise ValueError(f"tp={tp} * dp={dp} is {tp * dp} ranks, but this job has {world}{hint}")
    if is_started:
        return
    store: dict[str, Any] = {}
    if "RANK" not in os.environ:  # one process, which torchrun did not start
        store = {"store": HashStore(), "rank": 0, "world_size": 1}
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timeout, **store)


def _new_groups(rows: torch.Tensor, backend: str, timeout, options=None) -> ProcessGroup:
    """Make a group of each of `rows` [groups, size], and return the caller's."""
    groups: Any = dist.new_subgroups_by_enumeration(rows.tolist(), timeout, backend, options)
    return groups[0]


def _chunked_nccl_options():
    # Without priority a collective queues behind the next GEMM's blocks.
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = CHUNKED_NCCL_CTAS
    return options
