"""What `tune` measured for a group: installed on all its ranks alike, saved by its first rank."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tpkernels_planner.files import write_atomically

from ..files import cache_folder
from ..group import Group
from ..peer_memory import gather_objects
from .model import Curve, Shape, Timings


@dataclass(frozen=True)
class Place:
    """What a table holds for: the first rank's device, the group's link, its size. The same on every rank."""

    device: str
    link: str
    ranks: int
    hosts: int

    @staticmethod
    def of(group: Group) -> Place:
        """Every rank of the group must call it."""
        interface = os.environ.get(
            {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}.get(group.transport, ""),
            "",
        )
        places = gather_objects(
            group.pg, (_device_name(group.device_type), interface, socket.gethostname())
        )
        hosts = len({host for _, _, host in places})
        device, interface, _ = places[0]
        words = [
            group.transport,
            *([f"over {interface}"] if interface else []),
            f"on {hosts} host{'s' if hosts > 1 else ''}",
        ]
        return Place(device, " ".join(words), group.size, hosts)

    @property
    def path(self) -> Path:
        """Where the table is kept, in the user's cache folder."""
        name = re.sub(r"[^\w.]+", "-", f"schedules {self.device} {self.link} {self.ranks} ranks")
        return cache_folder() / f"{name}.json"


@dataclass(frozen=True)
class Table:
    """A group's measurements, by dtype, with where and when they were taken.

    `chosen` keeps what was decided from them, so that a forward looks it up.
    """

    place: str
    date: str
    dtypes: dict[torch.dtype, Timings]
    chosen: dict = field(default_factory=dict, compare=False)

    def to_json(self) -> str:
        dtypes = {
            str(dtype).removeprefix("torch."): {
                "gemms": [[*sizes, curve.points] for sizes, curve in t.gemms.items()],
                "messages": t.messages.points,
                "chunked_messages": t.chunked_messages.points,
                "steal": t.steal,
                "measured": [[*shape, list(times.items())] for shape, times in t.measured.items()],
            }
            for dtype, t in self.dtypes.items()
        }
        return json.dumps({"place": self.place, "date": self.date, "dtypes": dtypes}, indent=1)

    @staticmethod
    def from_json(text: str) -> Table:
        """Raises ValueError, TypeError, KeyError or AttributeError where `text` is not what to_json writes."""
        found, dtypes = json.loads(text), {}
        for name, t in found["dtypes"].items():
            dtype = getattr(torch, name)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} is no dtype")
            gemms = {
                (int(inner), int(features)): _curve(points)
                for inner, features, points in t["gemms"]
            }
            measured = {
                Shape(int(rows), int(inner), int(features), bool(wgrad)): {
                    int(chunks): float(seconds) for chunks, seconds in times
                }
                for rows, inner, features, wgrad, times in t["measured"]
            }
            if not gemms or any(1 not in times for times in measured.values()):
                raise ValueError(f"{name} is incomplete")
            links = _curve(t["messages"]), _curve(t["chunked_messages"])
            dtypes[dtype] = Timings(dtype.itemsize, gemms, *links, float(t["steal"]), measured)
        return Table(str(found["place"]), str(found["date"]), dtypes)


def _curve(points) -> Curve:
    points = tuple((float(size), float(seconds)) for size, seconds in points)
    sizes = [size for size, _ in points]
    if not points or sizes != sorted(set(sizes)) or min(min(point) for point in points) <= 0:
        raise ValueError("a curve's sizes must rise, and all its numbers be above zero")
    return Curve(points)


def _device_name(device_type: str) -> str:
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (model := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        name = model[1].strip()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


_installed: dict[ProcessGroup, Table] = {}


def installed(group: Group) -> Table | None:
    """The table that the group's schedules come from."""
    return _installed.get(group.pg)


def install(table: Table | None, group: Group) -> Table | None:
    """Makes every rank use rank 0's `table`, or none. Every rank of the group must call it."""
    box = [table.to_json() if group.rank == 0 and table is not None else None]
    dist.broadcast_object_list(box, group=group.pg, group_src=0)
    for old in [old for old in _installed if old not in dist.distributed_c10d._world.pg_map]:
        del _installed[old]
    _installed.pop(group.pg, None)
    if box[0] is not None:
        _installed[group.pg] = Table.from_json(box[0])
    return installed(group)


def save(table: Table, place: Place) -> None:
    place.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place.path, table.to_json())


def load(group: Group) -> Table | None:
    """Makes all ranks use the table that the group's first rank saved for this place, if it did. Every rank must call it."""
    place, table = Place.of(group), None
    if group.rank == 0 and place.path.exists():
        try:
            table = Table.from_json(place.path.read_text())
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
        ) as error:  # the others wait for a table, whatever this one's state
            warnings.warn(
                f"{place.path} cannot be read ({error!r}): run `tpkernels tune` again", stacklevel=3
            )
    table = install(table, group)
    if table is None and place.hosts > 1 and group.rank == 0:
        warnings.warn(
            f"the {place.ranks} ranks are on {place.hosts} hosts and their link was never measured: tpk.tune(group), or `tpkernels tune` "
            "under the same torchrun, lets all-reduces run under GEMMs where that is faster",
            stacklevel=3,
        )
    return table
