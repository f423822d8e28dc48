"""The bytes that kernels move, counted: every load and store of their launches in the interpreter,
lane by lane, masks applied.

What is counted is what the kernels ask for, and what torch does around them is not seen. A GPU
moves sectors of 32 bytes; where whole rows are touched that is the same.
"""

from __future__ import annotations

import contextlib
import importlib

import numpy as np
from aot import Traffic
from interpreter import install
from triton.runtime import interpreter as triton_interpreter

# A share of an op's least bytes. A vector of a bias or of weights is smaller: every program reads
# it, and any cache holds it.
SMALL = 0.01


class Bytes:
    """Counts the bytes of one storage: read and written, with repetitions and without."""

    def __init__(self, tensor):
        self.tensor = tensor  # kept, so that nothing else gets its address while we count
        self.itemsize = tensor.element_size()
        self.touched = {
            kind: np.zeros(tensor.untyped_storage().nbytes() // self.itemsize, dtype=bool)
            for kind in ("load", "store")
        }
        self.moved = {"load": 0, "store": 0}

    def add(self, kind: str, offsets: np.ndarray) -> None:
        self.moved[kind] += offsets.size * self.itemsize
        self.touched[kind][offsets] = True

    read = property(lambda self: self.moved["load"])
    written = property(lambda self: self.moved["store"])
    distinct_read = property(lambda self: int(self.touched["load"].sum()) * self.itemsize)
    distinct_written = property(lambda self: int(self.touched["store"].sum()) * self.itemsize)


def _storage(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Counter:
    def __init__(self):
        self.storages: dict[int, Bytes] = {}

    def of(self, tensor) -> Bytes:
        """The counts of the tensor's storage: views of one buffer are counted together."""
        return self.storages.setdefault(_storage(tensor), Bytes(tensor))

    def observe(self, kind: str, region, offsets: np.ndarray) -> None:
        self.of(region.tensor).add(kind, offsets + region.tensor.storage_offset())


@contextlib.contextmanager
def count_traffic():
    """Yields a Counter of the launches inside.

    Buffers that are no arguments count where `interpreter.visible` names them.
    """
    install()
    builder, counter = triton_interpreter.interpreter_builder, Counter()
    before, builder.observe = builder.observe, counter.observe
    try:
        yield counter
    finally:
        builder.observe = before


def measure(case: str, op: str) -> Traffic:
    """Runs the op and holds the bytes that its kernels move against the least: each element of an
    input that is touched at all read once, each of an output written once. Inputs that are SMALL
    count once. In a process with TRITON_INTERPRET=1.

    case: "module:function"; function(op) launches the op on small tensors and returns {"inputs":
    {name: tensor}, "outputs": {...}}.
    """
    module, function = case.split(":")
    with count_traffic() as counter:
        tensors = getattr(importlib.import_module(module), function)(op)
    inputs, outputs = (
        {_storage(t) for t in tensors[key].values() if t is not None and t.numel()}
        for key in ("inputs", "outputs")
    )
    counts = counter.storages
    least = sum(counts[s].distinct_read for s in inputs if s in counts) + sum(
        counts[s].distinct_written for s in outputs if s in counts
    )
    if not least:
        raise ValueError(f"{case} of {op!r} launches no kernel that touches its inputs or outputs")
    moved, scratch = 0, 0
    for storage, count in counts.items():
        if storage not in inputs | outputs:
            scratch += count.read + count.written
        elif storage in inputs and count.distinct_read < SMALL * least:
            moved += count.distinct_read + count.written
        else:
            moved += count.read + count.written
    return Traffic(
        moved,
        scratch,
        least,
        max(max(c.distinct_read, c.distinct_written) // c.itemsize for c in counts.values()),
    )
