"""GPUs, their nodes and links: JSON files with sources (data/hardware), or the user's own."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PlanError, unknown_name
from .model import DATA


@dataclass(frozen=True)
class Link:
    """A link between GPUs.

    Attributes:
        kind: its name.
        bus_bytes_per_s: bus bandwidth of a large all-reduce over it.
    """

    kind: str
    bus_bytes_per_s: float


@dataclass(frozen=True)
class Hardware:
    """One GPU and its node.

    Attributes:
        name, title: its short and its full name.
        memory_bytes, memory_bytes_per_s: size and bandwidth of its memory.
        flops_per_s: dense peak by dtype.
        multiprocessors: tiles of a GEMM that run at once.
        gpus_per_node: GPUs of a node.
        link: the link between the GPUs of a node.
        network: a GPU's share of its node's ports.
        constants_of: the GPU whose fitted `Constants` it takes.
        constants: constants of its own, which replace those.
        software: the software of the steps that were measured on it, the default of `predict`.
        sources: where the numbers are from.
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
        """Return the dense peak FLOP/s of a dtype.

        Raises:
            PlanError: the GPU has no such arithmetic.
        """
        for name, value in self.flops_per_s:
            if name == dtype:
                return value
        names = ", ".join(name for name, _ in self.flops_per_s)
        raise PlanError(f"{self.name} has no {dtype} arithmetic; it has {names}")

    @property
    def training_dtype(self) -> str:
        """The default dtype of a job: bfloat16, or the 16-bit dtype that the GPU has."""
        names = dict(self.flops_per_s)
        return next(dtype for dtype in ("bfloat16", "float16", *names) if dtype in names)


def _parse(data: dict[str, Any], name: str) -> Hardware:
    """Make the hardware of a file's keys."""
    node = data["node"]
    network = node["network"]
    return Hardware(
        name=name,
        title=str(data["title"]),
        memory_bytes=data["memory_bytes"],
        memory_bytes_per_s=data["memory_bytes_per_s"],
        flops_per_s=tuple(data["flops_per_s"].items()),
        multiprocessors=data["multiprocessors"],
        gpus_per_node=node["gpus"],
        link=Link(node["link"]["kind"], node["link"]["bus_bytes_per_s"]),
        network=Link(network["kind"], network["bytes_per_s"]),
        constants_of=data["constants_of"],
        constants=tuple(data.get("constants", {}).items()),
        software=data.get("software", "tpkernels"),
        sources=tuple(data.get("sources", ())),
    )


def _is_positive(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, (int, float)) and 0 < value < math.inf


def _read(path: Path, name: str) -> Hardware:
    """Read and check a GPU's file."""
    try:
        hardware = _parse(json.loads(path.read_text()), name)
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
        **{f"constants.{key}": value for key, value in hardware.constants},
    }
    for key, value in numbers.items():
        if not _is_positive(value):
            raise PlanError(f"{path}: {key} must be a positive number, got {value!r}")
    return hardware


@functools.cache
def _names() -> dict[str, str]:
    """Map every name and alias to the name of its file in data/hardware."""
    names: dict[str, str] = {}
    for path in (DATA / "hardware").glob("*.json"):
        aliases = json.loads(path.read_text())["aliases"]
        names.update(dict.fromkeys([path.stem, *aliases], path.stem))
    return names


def load_hardware(name: str) -> Hardware:
    """Load a GPU by its name in data/hardware or by the path of a JSON file of the same kind.

    Raises:
        PlanError: an unknown name (with those near it), or a file that lacks a key or has a
            number that makes no sense.

    Example:
        >>> load_hardware("h100").gpus_per_node
        8
    """
    if name.endswith(".json"):
        return _read(Path(name), Path(name).stem)
    stem = _names().get(name.lower())
    if stem is None:
        raise unknown_name("GPU", name, _names())
    return _read(DATA / "hardware" / f"{stem}.json", stem)
