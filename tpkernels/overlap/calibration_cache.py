"""Calibrations: what `tune` measured, installed on all ranks of a group and kept in a file."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import warnings
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup

from tpkernels_planner.files import write_atomically

from ..cache import cache_folder
from ..group import Group, forget_schedules
from ..process_group import broadcast_object, gather_objects
from .cost_model import Curve, GemmShape, Timings


@dataclass(frozen=True)
class CalibrationKey:
    """The machines and link that a calibration holds for; the same on every rank.

    Attributes:
        device: the first rank's.
        link: transport, network interface and number of hosts, in words.
        ranks: size of the group.
        hosts: number of hosts.
    """

    device: str
    link: str
    ranks: int
    hosts: int

    @staticmethod
    def of(group: Group) -> CalibrationKey:
        """Return the key of `group`.

        Collective: every rank of the group must call it.
        """
        variables = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
        interface = os.environ.get(variables.get(group.transport, ""), "")
        own = _device_name(group.device_type), interface, socket.gethostname()
        places = gather_objects(group.pg, own)
        hosts = len({host for _, _, host in places})
        device, interface, _ = places[0]
        words = [group.transport]
        if interface:
            words.append(f"over {interface}")
        words.append("on 1 host" if hosts == 1 else f"on {hosts} hosts")
        return CalibrationKey(device, " ".join(words), group.size, hosts)

    @property
    def path(self) -> Path:
        """File of the calibration, in the user's cache folder."""
        name = re.sub(r"[^\w.]+", "-", f"calibration {self.device} {self.link} {self.ranks} ranks")
        return cache_folder() / f"{name}.json"


@dataclass(frozen=True)
class Calibration:
    """A group's measurements.

    Attributes:
        measured_on: device, link and number of ranks, in words.
        date: when they were taken.
        timings: by dtype.
    """

    measured_on: str
    date: str
    timings: dict[torch.dtype, Timings]

    def to_json(self) -> str:
        """Return the calibration as text that `from_json` reads."""
        dtypes = {
            str(dtype).removeprefix("torch."): {
                "gemms": [[*size, curve.points] for size, curve in t.gemms.items()],
                "all_reduces": t.all_reduces.points,
                "chunked_all_reduces": t.chunked_all_reduces.points,
                "contention": t.contention,
                "measured": [[*shape, list(times.items())] for shape, times in t.measured.items()],
            }
            for dtype, t in self.timings.items()
        }
        found = {"measured_on": self.measured_on, "date": self.date, "dtypes": dtypes}
        return json.dumps(found, indent=1)

    @staticmethod
    def from_json(text: str) -> Calibration:
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: `text` is something else.
        """
        found = json.loads(text)
        timings = {}
        for name, fields in found["dtypes"].items():
            dtype = getattr(torch, name)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} is no dtype")
            timings[dtype] = _timings_of(dtype, fields)
        return Calibration(str(found["measured_on"]), str(found["date"]), timings)


def _timings_of(dtype: torch.dtype, fields: dict) -> Timings:
    gemms = {(int(k), int(n)): _curve_of(points) for k, n, points in fields["gemms"]}
    measured = {
        GemmShape(int(m), int(k), int(n), bool(weight_grad)): {
            int(chunks): float(seconds) for chunks, seconds in times
        }
        for m, k, n, weight_grad, times in fields["measured"]
    }
    if not gemms or any(1 not in times for times in measured.values()):
        raise ValueError(f"{dtype} is incomplete")
    all_reduces = _curve_of(fields["all_reduces"])
    chunked_all_reduces = _curve_of(fields["chunked_all_reduces"])
    contention = float(fields["contention"])
    return Timings(dtype.itemsize, gemms, all_reduces, chunked_all_reduces, contention, measured)


def _curve_of(points) -> Curve:
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
    if cpuinfo.exists():
        model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = model[1].strip() if model else name
    threads = torch.get_num_threads()
    return f"{name}, 1 thread" if threads == 1 else f"{name}, {threads} threads"


_installed: WeakKeyDictionary[ProcessGroup, Calibration] = WeakKeyDictionary()


def calibration_of(group: Group) -> Calibration | None:
    """Return the calibration that the group's schedules come from, or None."""
    return _installed.get(group.pg)


def install(calibration: Calibration | None, group: Group) -> Calibration | None:
    """Make every rank use the first rank's `calibration`, or none.

    Collective: every rank of the group must call it.
    """
    text = None if calibration is None else calibration.to_json()
    text = broadcast_object(group.pg, text)
    _installed.pop(group.pg, None)
    forget_schedules(group.pg)
    if text is not None:
        _installed[group.pg] = Calibration.from_json(text)
    return calibration_of(group)


def save(calibration: Calibration, key: CalibrationKey) -> None:
    """Write the calibration to the key's file, in place of an earlier one."""
    key.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(key.path, calibration.to_json())


def load(group: Group) -> Calibration | None:
    """Make all ranks use the calibration that the group's first rank saved, if it did.

    Collective: every rank of the group must call it.
    """
    key, calibration = CalibrationKey.of(group), None
    if group.rank == 0 and key.path.exists():
        try:
            calibration = Calibration.from_json(key.path.read_text())
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            # The others wait for a calibration, whatever state this file is in.
            warnings.warn(
                f"{key.path} cannot be read ({error!r}): run `tpkernels tune` again", stacklevel=3
            )
    calibration = install(calibration, group)
    if calibration is None and key.hosts > 1 and group.rank == 0:
        warnings.warn(
            f"the {key.ranks} ranks are on {key.hosts} hosts and their link was never measured: "
            "tpk.tune(group), or `tpkernels tune` under the same torchrun, lets all-reduces run "
            "under GEMMs where that is faster",
            stacklevel=3,
        )
    return calibration
