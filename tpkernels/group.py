"""Process groups: the ("dp", "tp") mesh, and the tensor-parallel group that a layer holds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .kernels import registration
from .peer_memory import open_peer_memory, peer_memory
from .shm import forced_transport, shm_obstacles

if TYPE_CHECKING:
    from tpkernels_planner import Layout, LayoutChoice

_meshes: list[
    tuple[DeviceMesh, ProcessGroup]
] = []  # what init_mesh made, with its tp group, for group=None
_chunked_groups: dict[
    str, ProcessGroup
] = {}  # tp group's name -> the group for its chunked schedules (NCCL)

# NCCL's share of a GPU while a GEMM runs beside it. Published advice is "few"; no figure of ours yet (not measured).
CHUNKED_NCCL_CTAS = 16


def _cpu_transport(pg: ProcessGroup) -> str:
    # Not by dist.get_backend, which says what was asked for: TPKERNELS_TRANSPORT=gloo puts a group asked for with shm on gloo.
    return (
        "shm"
        if "shm" in dist.get_backend(pg) and pg._get_backend(torch.device("cpu")).name() == "shm"
        else "gloo"
    )


class Group:
    """A tensor-parallel group as a layer holds it, resolved once: looking it up in a mesh costs ~160 us each time.

    Attributes:
        size, rank: of the group and of the caller in it.
        name: by which C++ finds the group (`c10d::resolve_process_group`).
        device_type: "cpu" or "cuda".
        transport: what carries its collectives: "gloo", "shm" or "nccl".
        peers: what its small all-reduces run on instead of NCCL, if anything.
    """

    def __init__(self, pg: ProcessGroup, device_type: str, mesh: DeviceMesh | None = None):
        self.pg, self.device_type, self._mesh = pg, device_type, mesh
        self.size, self.rank, self.name = pg.size(), pg.rank(), pg.group_name
        self.transport = "nccl" if device_type == "cuda" else _cpu_transport(pg)
        self.peers = peer_memory(pg)
        self.schedules: dict = {}  # what was chosen without measurements, so that a forward looks it up
        chunked = _chunked_groups.get(pg.group_name)
        chunked = chunked if _alive(chunked) else None
        # A second communicator (high stream priority, few CTAs) for chunked schedules on NCCL. The two are never in flight at
        # once: an op waits for its collectives on the stream that the next op's are launched from.
        self.has_chunked_group = chunked is not None
        self.chunked_name = chunked.group_name if chunked is not None else pg.group_name

    @property
    def mesh(self) -> DeviceMesh:
        """The 1-D mesh that DTensor parameters live on."""
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.pg, self.device_type, mesh_dim_names=("tp",))
        return self._mesh

    def channel(self, chunks: int) -> str:
        """The name of the group that a schedule of `chunks` chunks communicates on."""
        return self.name if chunks == 1 else self.chunked_name

    def __deepcopy__(self, memo):
        return self  # a copied model talks over the same group

    def __reduce__(self):
        raise TypeError(
            "a tensor-parallel module holds a process group and cannot be pickled: save tpk.unsharded_state_dict(model)"
        )

    def __repr__(self):
        return f"Group(rank {self.rank} of {self.size}, {self.device_type})"


def resolve_group(group: Group | ProcessGroup | DeviceMesh | None) -> Group:
    """The `Group` of a ProcessGroup, of a 1-D DeviceMesh, or for None of the mesh that `init_mesh` made.

    Raises:
        ValueError: no mesh or more than one to choose from, a mesh of several dimensions, a group without the calling rank.
        TypeError: anything else was passed.
    """
    if isinstance(group, Group):
        return group
    if group is None:
        groups = {pg.group_name: mesh for mesh, pg in _meshes if _alive(pg)}
        if not groups:
            raise ValueError(
                "group=None means the 'tp' group of the mesh that tpk.init_mesh made, and it made none: call it first, or pass group="
            )
        if len(groups) > 1:
            raise ValueError(
                f"group=None is ambiguous: tpk.init_mesh made {len(groups)} meshes; pass group=mesh['tp']"
            )
        group = next(iter(groups.values()))["tp"]
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of dimensions {group.mesh_dim_names or group.ndim}: pass one of them, such as mesh['tp']"
            )
        return Group(group.get_group(), group.device_type, group)
    if group is dist.GroupMember.NON_GROUP_MEMBER or (
        isinstance(group, ProcessGroup) and dist.get_rank(group) < 0
    ):
        raise ValueError(
            f"group does not contain the calling rank (global rank {dist.get_rank()}): build the layer on the group's own ranks only"
        )
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup, a 1-D DeviceMesh or None, got {type(group).__name__}"
        )
    found = Group(group, "cuda" if "nccl" in dist.get_backend(group) else "cpu")
    forced = forced_transport()
    if (
        found.device_type == "cpu"
        and found.size > 1
        and forced in ("gloo", "shm")
        and forced != found.transport
    ):
        warnings.warn(
            f"TPKERNELS_TRANSPORT={forced}, but a group that was passed keeps its own transport, {found.transport}: pass a mesh of "
            f"tpk.init_mesh, or make the group with backend={forced!r}",
            stacklevel=3,
        )
    return found


def init_mesh(
    tp: int | Layout | LayoutChoice,
    dp: int = 1,
    *,
    device: str | None = None,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> DeviceMesh:
    """A DeviceMesh ("dp", "tp") of dp * tp ranks, tp innermost, so that a TP group's ranks are neighbours on one node.

    Starts the default process group from torchrun's variables if there is none, and leaves one that exists as it is. The mesh's
    own groups are new: NCCL on GPUs (with, for chunked schedules, a second one of high stream priority and few CTAs, and for small
    all-reduces the GPUs' peer memory where they have access to it; where not, a warning says why); on CPUs shared memory for ranks of
    one host, gloo for others; unless `backend` names another. On GPUs the current device is set from LOCAL_RANK. The TP ranks take what
    `tpk.tune` saved on their first rank's machine for such a group, if it did; if not and they are on several hosts, a warning says so.

    Args:
        tp, dp: sizes; tp * dp must be the number of ranks. Or, in place of both, what `tpk.plan` returned, or a `tpkernels_planner.Layout`.
        device: "cuda" or "cpu"; None takes CUDA if it is there.
        backend: the c10d backend of the mesh's groups.
        timeout: of the groups' collectives; None takes torch's.

    Raises:
        ValueError: a size below 1, a layout with a pipeline, tp * dp is not the number of ranks, or no torchrun variables where several ranks are asked for.
    """
    if hasattr(tp, "pp"):
        if tp.pp != 1:
            raise ValueError(
                f"the layout has a pipeline, pp={tp.pp}, which tpkernels does not run: plan with max_pp=1"
            )
        tp, dp = tp.tp, tp.dp
    for name, size in (("tp", tp), ("dp", dp)):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        world = int(os.environ.get("WORLD_SIZE", 1))
        if tp * dp != world:
            hint = (
                ""
                if "WORLD_SIZE" in os.environ
                else f": start it with `torchrun --nproc-per-node {tp * dp}`"
            )
            raise ValueError(
                f"tp={tp} * dp={dp} is {tp * dp} ranks, but this job has {world}{hint}"
            )
        everywhere = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        alone = (
            {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        )
        dist.init_process_group(everywhere, timeout=timeout, **alone)
    if tp * dp != dist.get_world_size():
        raise ValueError(
            f"tp={tp} * dp={dp} is {tp * dp} ranks, but this job has {dist.get_world_size()}"
        )

    ranks = torch.arange(tp * dp).view(dp, tp)

    def new_groups(
        rows: torch.Tensor, backend: str, options: Callable | None = None
    ) -> ProcessGroup:
        return dist.new_subgroups_by_enumeration(
            rows.tolist(), timeout, backend, options and options()
        )[0]

    backends = (
        [backend] * 2
        if backend
        else ["cpu:gloo,cuda:nccl"] * 2
        if device == "cuda"
        else _cpu_backends(ranks, ranks.t())
    )
    tp_group, dp_group = new_groups(ranks, backends[0]), new_groups(ranks.t(), backends[1])
    if device == "cuda" and "nccl" in backends[0] and tp > 1:
        _chunked_groups[tp_group.group_name] = new_groups(ranks, backends[0], _chunked_nccl_options)
        open_peer_memory(tp_group, torch.device("cuda", torch.cuda.current_device()))
    mesh = DeviceMesh.from_group([dp_group, tp_group], device, ranks, mesh_dim_names=("dp", "tp"))
    if device == "cuda" and registration.available():
        from .kernels import tuning  # imports Triton

        tuning.load(tp_group)
    if tp > 1:
        from .schedule import table  # imports this module

        table.load(Group(tp_group, device))
    _meshes[:] = [made for made in _meshes if _alive(made[1])] + [(mesh, tp_group)]
    return mesh


def _cpu_backends(*groups: torch.Tensor) -> list[str]:
    """shm where the ranks of each of the `groups` [n, size] share a host, else gloo; the same answer on every rank."""
    forced = forced_transport()
    if forced == "gloo":
        return ["gloo"] * len(groups)
    backends = []
    for rows, obstacle in zip(groups, shm_obstacles(*groups), strict=True):
        size = rows.shape[1]
        if obstacle is not None and size > 1:
            if forced == "shm":
                raise RuntimeError(
                    f"TPKERNELS_TRANSPORT=shm, but {obstacle}: unset it to take gloo there"
                )
            if dist.get_rank() == 0:
                warnings.warn(
                    f"groups of {size} ranks run on gloo, not on shared memory: {obstacle}",
                    stacklevel=3,
                )
        backends.append("shm" if obstacle is None and size > 1 else "gloo")
    return backends


def _chunked_nccl_options():
    options = dist.ProcessGroupNCCL.Options(
        is_high_priority_stream=True
    )  # else it queues behind the next GEMM's blocks
    options.config.max_ctas = CHUNKED_NCCL_CTAS
    return options


def _alive(group: ProcessGroup | None) -> bool:
    """Whether it still exists: destroy_process_group ends it, and the next world's groups may have its name."""
    return group is not None and group in dist.distributed_c10d._world.pg_map
