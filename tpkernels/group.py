"""The tensor-parallel group that a layer holds, resolved once."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary, finalize

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from .peer_memory import PeerMemory, peer_memory_of
from .process_group import default_group, is_alive
from .transport import forced_transport, transport_of

_meshes: list[tuple[DeviceMesh, ProcessGroup]] = []  # init_mesh's, with its tp group: group=None
_chunked_groups: dict[str, ProcessGroup] = {}  # tp group's name -> its group for chunked schedules
# Schedules chosen so far. `Group`s share them where nothing that a schedule depends on differs.
# Groups are held weakly: gloo's peers see this rank leave only when nothing holds the group.
_schedules: WeakKeyDictionary[ProcessGroup, dict[tuple[str, tuple[str, str], PeerMemory], dict]]
_schedules = WeakKeyDictionary()


def forget_schedules(pg: ProcessGroup) -> None:
    """Forget the schedules chosen for `pg`, as what they rest on has changed."""
    for schedules in _schedules.get(pg, {}).values():
        schedules.clear()


class Group:
    """A tensor-parallel group, looked up once: in a mesh a lookup costs about 160 us.

    Attributes:
        size: number of ranks.
        rank: the caller's rank in the group.
        name: the name by which C++ finds the group (`c10d::resolve_process_group`).
        device_type: "cpu" or "cuda".
        transport: what carries the collectives: "gloo", "shm" or "nccl".
        peer_memory: peer-memory path for small all-reduces on GPUs, closed where there is none.
        channels: names of the process groups that carry a schedule of one chunk, and of several.
        has_chunked_group: whether chunked schedules have a communicator of their own.
        schedules: (chunks, channel) chosen so far, so that a forward looks them up.
    """

    def __init__(self, pg: ProcessGroup, device_type: str, mesh: DeviceMesh | None = None):
        self.pg, self.device_type, self._mesh = pg, device_type, mesh
        self.size, self.rank, self.name = pg.size(), pg.rank(), pg.group_name
        self.transport = transport_of(pg, device_type)
        self.peer_memory = peer_memory_of(pg)
        # NCCL's chunked schedules have a second communicator (high stream priority, few CTAs).
        # The two are never in flight at once: an op waits for its collectives on the stream that
        # the next op's are launched from.
        chunked = _chunked_groups.get(pg.group_name)
        self.has_chunked_group = is_alive(chunked)
        self.channels = (self.name, self.name)
        if chunked is not None and self.has_chunked_group:
            self.channels = (self.name, chunked.group_name)
        key = device_type, self.channels, self.peer_memory
        self.schedules = _schedules.setdefault(pg, {}).setdefault(key, {})

    @property
    def mesh(self) -> DeviceMesh:
        """The 1-D mesh that DTensor parameters live on."""
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.pg, self.device_type, mesh_dim_names=("tp",))
        return self._mesh

    def __deepcopy__(self, memo) -> Group:
        return self  # a copied model communicates over the same group

    def __reduce__(self):
        raise TypeError(
            "a tensor-parallel module holds a process group and cannot be pickled: "
            "save tpk.unsharded_state_dict(model)"
        )

    def __repr__(self):
        return f"Group(rank {self.rank} of {self.size}, {self.device_type})"


GroupLike = Group | ProcessGroup | DeviceMesh | None


def resolve_group(group: GroupLike) -> Group:
    """Return the `Group` of a ProcessGroup or a 1-D DeviceMesh.

    None stands for the "tp" group of the mesh that `init_mesh` made.

    Raises:
        ValueError: no mesh or more than one to choose from, a mesh of several dimensions, a group
            without the calling rank.
        TypeError: anything else was passed.
    """
    if isinstance(group, Group):
        return group
    if group is None:
        group = _only_mesh()["tp"]
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group is a mesh of dimensions {group.mesh_dim_names or group.ndim}: "
                "pass one of them, such as mesh['tp']"
            )
        return Group(group.get_group(), group.device_type, group)
    is_outside = isinstance(group, ProcessGroup) and dist.get_rank(group) < 0
    if group is dist.GroupMember.NON_GROUP_MEMBER or is_outside:
        raise ValueError(
            f"group does not contain the calling rank (global rank {dist.get_rank()}): "
            "build the layer on the group's own ranks only"
        )
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup, a 1-D DeviceMesh or None, got {type(group).__name__}"
        )
    found = Group(group, "cuda" if "nccl" in dist.get_backend(group) else "cpu")
    forced = forced_transport()
    can_be_forced = found.device_type == "cpu" and found.size > 1 and forced in ("gloo", "shm")
    if can_be_forced and forced != found.transport:
        warnings.warn(
            f"TPKERNELS_TRANSPORT={forced}, but a group that was passed keeps its own transport, "
            f"{found.transport}: pass a mesh of tpk.init_mesh, or make the group with "
            f"backend={forced!r}",
            stacklevel=3,
        )
    return found


def _only_mesh() -> DeviceMesh:
    meshes = {pg.group_name: mesh for mesh, pg in _meshes if is_alive(pg)}
    if not meshes:
        raise ValueError(
            "group=None means the 'tp' group of the mesh that tpk.init_mesh made, and it made "
            "none: call it first, or pass group="
        )
    if len(meshes) > 1:
        raise ValueError(
            f"group=None is ambiguous: tpk.init_mesh made {len(meshes)} meshes; "
            "pass group=mesh['tp']"
        )
    return next(iter(meshes.values()))


def register_mesh(mesh: DeviceMesh, tp_group: ProcessGroup) -> None:
    """Make `mesh` one that group=None stands for."""
    _forget_dead_meshes()
    _meshes.append((mesh, tp_group))
    # A mesh holds its groups, whose memory and connections must go with their world.
    finalize(default_group(), _forget_dead_meshes).atexit = False


def _forget_dead_meshes() -> None:
    _meshes[:] = [made for made in _meshes if is_alive(made[1])]


def register_chunked_group(tp_group: ProcessGroup, chunked: ProcessGroup) -> None:
    """Make the chunked schedules of `tp_group` run on the communicator `chunked`."""
    _chunked_groups[tp_group.group_name] = chunked
