"""The bytes that a kernel moves, counted: every load and store of its launches in the interpreter, lane by lane, masks applied.

This counts what the kernel asks for. Caches may serve part of it, which is why a Spec may name arguments that all programs read and that
are small against the cache. A GPU moves whole sectors of 32 bytes; for the contiguous rows that kernels here touch these are the same.
"""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import dataclass, field

import numpy as np
from aot import Spec, Traffic
from interpreter import install, visible
from triton.runtime import interpreter as triton_interpreter


@dataclass
class Bytes:
    """Of one tensor: bytes read and written, and the bytes of the elements that were touched at least once."""

    read: int = 0
    written: int = 0
    touched: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    itemsize: int = 0

    def distinct(self, kind: str) -> int:
        """kind: "load" or "store"."""
        return int(self.touched[kind].sum()) * self.itemsize if kind in self.touched else 0


@contextlib.contextmanager
def count_traffic(tensors: dict | None = None):
    """Yields a dict name -> Bytes, filled by the launches inside. `tensors` (name -> tensor) are counted under their names, other
    arguments under "kernel.argument". Tensors that share memory are counted under the first."""
    install()
    counts: dict[str, Bytes] = {}
    builder = triton_interpreter.interpreter_builder

    def observe(kind, kernel, region, offsets, itemsize):
        name = region.name if any(region is other for other in builder.others) else f"{kernel}.{region.name}"
        count = counts.setdefault(name, Bytes(itemsize=itemsize))
        moved = offsets.size * itemsize
        if kind == "load":
            count.read += moved
        else:
            count.written += moved
        touched = count.touched.setdefault(kind, np.zeros(region.elements, dtype=bool))
        if touched.size < region.elements:  # a later launch, with a larger tensor of that name
            touched = count.touched[kind] = np.pad(touched, (0, region.elements - touched.size))
        touched[offsets] = True

    before, builder.observe = builder.observe, observe
    try:
        with visible(**(tensors or {})):
            yield counts
    finally:
        builder.observe = before


def measure(spec: Spec) -> Traffic:
    """Runs spec.case and holds the launches of spec's kernel against spec.reads and spec.writes. In a process with TRITON_INTERPRET=1."""
    module, function = spec.case.split(":")
    with count_traffic() as counts:
        getattr(importlib.import_module(module), function)()
    kernel = spec.kernel.split(":")[1]
    counts = {name.removeprefix(f"{kernel}."): count for name, count in counts.items() if name.startswith(f"{kernel}.")}
    if missing := {*spec.reads, *spec.writes} - counts.keys():
        raise ValueError(f"{spec.name}: {spec.case} made {kernel} touch {sorted(counts)}, not {sorted(missing)}")
    moved = sum((count.distinct("load") if name in spec.cached else count.read) + count.written for name, count in counts.items())
    least = sum(counts[name].distinct("load") for name in spec.reads) + sum(counts[name].distinct("store") for name in spec.writes)
    return Traffic(moved, least, max(int(mask.sum()) for count in counts.values() for mask in count.touched.values()))
