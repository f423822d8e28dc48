"""Which schedule a layer runs: how many row chunks, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..group import Group
from ..kernels.heuristics import fuses_activation as fuses_activation  # moved there
from .model import MIN_ROWS, Shape
from .table import Table, installed

# Below this many rows a chunked GEMM loses more than its all-reduce hides: kraken#19, pytorch#179770 and flux#79 report
# losses up to ~1k rows; twice that leaves each of two chunks 1k rows. Published figures, not measured here.
GPU_MIN_ROWS = 2048
GPU_CHUNKS = 2  # two beat four at 8192 x 8192 bf16 on an H100 (nvFuser#5751)


REMEMBERED = (
    4096  # choices of a table, or of a group without one: a server's batches have many sizes
)


@dataclass(frozen=True)
class Schedule:
    """The row chunks in which a GEMM and its all-reduce run, what carries the all-reduce, and the reason in words."""

    chunks: int
    transport: str
    reason: str


def check_overlap(overlap) -> None:
    """Raises ValueError unless `overlap` is "auto", False or an int of at least 1."""
    if (
        overlap == "auto"
        or overlap is False
        or (isinstance(overlap, int) and not isinstance(overlap, bool) and overlap >= 1)
    ):
        return
    raise ValueError(
        f"overlap must be 'auto', False (one chunk) or a number of row chunks >= 1, got {overlap!r}"
    )


def choose(
    overlap,
    rows: int,
    row_bytes: int,
    group: Group,
    inner: int | None = None,
    dtype: torch.dtype | None = None,
    weight_grad: bool = False,
) -> Schedule:
    """The schedule for `rows` rows of `row_bytes` bytes: a function of what all ranks share, so that they never disagree.

    Args:
        inner: the GEMM's inner size, the largest rank's; None where the caller does not know that the ranks' are equal.
        dtype: of the GEMM. Without it nothing measured applies.
        weight_grad: a weight's gradient follows the GEMM.
    """
    if overlap == "auto" and group.size > 1 and installed(group) is not None:
        if torch.compiler.is_compiling():
            if rows < 2 * MIN_ROWS:  # one graph for all of them
                return Schedule(1, group.transport, "too few rows for two chunks")
            from torch.fx.experimental.symbolic_shapes import (
                guard_scalar,
            )  # imports sympy: the compiler has it already

            return _constant(
                group.name,
                group.device_type,
                guard_scalar(rows),
                row_bytes,
                inner,
                dtype,
                weight_grad,
            )
        return _remembered(group, rows, row_bytes, inner, dtype, weight_grad)
    if torch.compiler.is_compiling():
        return _published(overlap, rows, row_bytes, group)
    key = overlap, rows, row_bytes
    schedule = group.schedules.get(key)
    if schedule is None:
        if len(group.schedules) >= REMEMBERED:
            group.schedules.clear()
        schedule = group.schedules[key] = _published(*key, group)
    return schedule


def _constant(name: str, device_type: str, *shape) -> Schedule:
    """For torch.compile, which cannot trace the model: the choice is fixed in the graph, and the graph holds for these rows only."""
    return _remembered(
        Group(dist.distributed_c10d._resolve_process_group(name), device_type), *shape
    )


_constant._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import the compiler: 1.2 s of an import


def _remembered(group: Group, *shape) -> Schedule:
    table = installed(group)
    schedule = table.chosen.get(shape)
    if schedule is None:
        if len(table.chosen) >= REMEMBERED:
            table.chosen.clear()
        schedule = table.chosen[shape] = _measured(table, group, *shape) or _published(
            "auto", *shape[:2], group
        )
    return schedule


def _measured(
    table: Table, group: Group, rows: int, row_bytes: int, inner, dtype, weight_grad: bool
) -> Schedule | None:
    """The table's choice; None where it has none for this dtype."""
    timings = table.dtypes.get(dtype)
    if timings is None:
        return None
    if group.transport == "shm":
        return Schedule(
            1, "shm", "the GEMM writes into the ranks' shared memory: one chunk, nothing to hide"
        )
    if 0 < rows * row_bytes <= group.peers.max_bytes:
        return None
    if inner is None:
        return Schedule(
            1,
            group.transport,
            "the ranks' shares may differ (no split was passed): one chunk, which needs no agreement",
        )
    if rows == 0:
        return Schedule(1, group.transport, "no rows")
    chunks, reason = timings.decide(Shape(rows, inner, row_bytes // timings.itemsize, weight_grad))
    return Schedule(chunks, group.transport, reason)


def _published(overlap, rows: int, row_bytes: int, group: Group) -> Schedule:
    nbytes, peers = rows * row_bytes, group.peers
    small = 0 < nbytes <= peers.max_bytes
    # A forced number of chunks above one means the pipeline, which the peer kernels, being part of the stream, have no use for.
    carrier = "symm" if small and overlap in ("auto", False, 1) else group.transport
    if group.size == 1:
        return Schedule(1, group.transport, "one rank: nothing to reduce")
    if overlap is False:
        return Schedule(1, carrier, "overlap=False: one chunk")
    if overlap != "auto":
        return Schedule(overlap, carrier, f"overlap={overlap} was asked for")
    if group.device_type == "cpu":
        reason = (
            "on CPUs the collective runs on the cores that the next chunk's GEMM needs: one chunk, until tpk.tune(group) has measured "
            "this link (it has not been run)"
        )
        return Schedule(1, group.transport, reason)
    if small:
        kind = "one-shot" if nbytes <= peers.one_shot_bytes else "two-shot"
        return Schedule(
            1,
            "symm",
            f"{nbytes:,} bytes <= {peers.max_bytes:,}: {kind} over peer memory (published, not measured)",
        )
    if rows < GPU_MIN_ROWS:
        reason = f"{rows} rows are fewer than {GPU_MIN_ROWS}: chunked GEMMs lose more than the overlap hides (published, not measured)"
        return Schedule(1, group.transport, reason)
    reason = f"{rows} rows >= {GPU_MIN_ROWS}: {GPU_CHUNKS} chunks hide half of the all-reduce (published, not measured)"
    return Schedule(GPU_CHUNKS, group.transport, reason)
