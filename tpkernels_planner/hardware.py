"""GPUs, their nodes and links: JSON files with sources (data/hardware), or the user's own."""

from __future__ import annotations

import bisect
import csv
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from .model import DATA, PlanError, near


@dataclass(frozen=True)
class Link:
    """kind: its name; bus_bytes_per_s: the bus bandwidth of an all-reduce of large messages."""

    kind: str
    bus_bytes_per_s: float


@dataclass(frozen=True)
class Hardware:
    """One GPU and the node it is in.

    Attributes:
        flops_per_s: dense peak by dtype.
        multiprocessors: how many tiles of a GEMM run at once.
        gpus_per_node, link: of a node. network: what each GPU has of the node's ports.
        constants_of, constants: whose fitted constants (`time.Constants`) hold for it too, and those that it has of its own.
        software: what the steps that were measured on it ran (`layout.SOFTWARE`), which `predict` takes unless told otherwise.
    """

    name: str
    title: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: tuple[tuple[str, float], ...]
    multiprocessors: int
    gpus_per_node: int
    link: Link
    network: Link
    constants_of: str = ""
    constants: tuple[tuple[str, float], ...] = ()
    software: str = "tpkernels"
    sources: tuple[str, ...] = ()

    def peak(self, dtype: str) -> float:
        for name, value in self.flops_per_s:
            if name == dtype:
                return value
        raise PlanError(
            f"{self.name} has no {dtype} arithmetic; it has {', '.join(name for name, _ in self.flops_per_s)}"
        )

    @property
    def half(self) -> str:
        """The 16-bit dtype to train in."""
        names = dict(self.flops_per_s)
        return next(dtype for dtype in ("bfloat16", "float16", *names) if dtype in names)


def _read(path: Path, name: str) -> Hardware:
    try:
        data = json.loads(path.read_text())
        node = data["node"]
        network = node["network"]
        hardware = Hardware(
            name,
            str(data["title"]),
            data["memory_bytes"],
            data["memory_bytes_per_s"],
            tuple(data["flops_per_s"].items()),
            data["multiprocessors"],
            node["gpus"],
            Link(node["link"]["kind"], node["link"]["bus_bytes_per_s"]),
            Link(network["kind"], network["bytes_per_s"]),
            data["constants_of"],
            tuple(data.get("constants", {}).items()),
            data.get("software", "tpkernels"),
            tuple(data.get("sources", ())),
        )
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    except KeyError as error:
        raise PlanError(
            f"{path} has no key {error}; docs/planner.md lists what a GPU's file needs"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{path} does not describe a GPU: {error}") from None
    numbers = {
        "memory_bytes": hardware.memory_bytes,
        "memory_bytes_per_s": hardware.memory_bytes_per_s,
        "multiprocessors": hardware.multiprocessors,
        "node.gpus": hardware.gpus_per_node,
        **{f"flops_per_s.{dtype}": value for dtype, value in hardware.flops_per_s},
        "node.link.bus_bytes_per_s": hardware.link.bus_bytes_per_s,
        "node.network.bytes_per_s": hardware.network.bus_bytes_per_s,
        **{f"constants.{name}": value for name, value in hardware.constants},
    }
    for key, value in numbers.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise PlanError(f"{path}: {key} must be a positive number, got {value!r}")
    return hardware


@functools.cache
def _names() -> dict[str, str]:
    names = {}
    for path in (DATA / "hardware").glob("*.json"):
        names.update(
            dict.fromkeys([path.stem, *json.loads(path.read_text())["aliases"]], path.stem)
        )
    return names


def load_hardware(name: str) -> Hardware:
    """A named GPU (data/hardware), or the path of a JSON file that describes one in the same way.

    Raises:
        PlanError: an unknown name, with those near it; a file that lacks a key or has a number that makes no sense.
    """
    if name.endswith(".json"):
        return _read(Path(name), Path(name).stem)
    stem = _names().get(name.lower())
    if stem is None:
        raise near("GPU", name, _names())
    return _read(DATA / "hardware" / f"{stem}.json", stem)


@functools.cache
def _curve() -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """(log messages in bytes, their share of the bus bandwidth of the largest, that bandwidth): 8xH200, measured."""
    with (DATA / "measured" / "allreduce_busbw.csv").open() as file:
        rows = [
            (float(r["message_MiB"]) * 2**20, float(r["busbw_GBps"]) * 1e9)
            for r in csv.DictReader(file)
            if r["system"] == "8xH200 NVLink SHARP"
        ]
    rows.sort()
    best = rows[-1][1]
    return (
        tuple(math.log(message) for message, _ in rows),
        tuple(bandwidth / best for _, bandwidth in rows),
        best,
    )


def bus_share(message: float, bus_bytes_per_s: float) -> float:
    """Share of a link's bus bandwidth that an all-reduce of `message` bytes reaches: the measured curve of 8 H200s, at the message that
    takes as long there; between its points by the logarithm, below the first in proportion to the message (a constant time)."""
    logs, shares, reference = _curve()
    at = math.log(max(message, 1.0) * reference / bus_bytes_per_s)
    if at <= logs[0]:
        return shares[0] * math.exp(at - logs[0])
    if at >= logs[-1]:
        return shares[-1]
    i = bisect.bisect_right(logs, at)
    part = (at - logs[i - 1]) / (logs[i] - logs[i - 1])
    return shares[i - 1] + part * (shares[i] - shares[i - 1])
