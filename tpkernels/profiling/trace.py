"""`tpkernels trace`: the share of a recorded trace's communication that ran under computation.

It reads Nsight Systems' SQLite export (tables NVTX_EVENTS, CUPTI_ACTIVITY_KIND_KERNEL and StringIds
of its "SQLite Schema Reference") and torch.profiler's Chrome trace. Times are nanoseconds.
"""

from __future__ import annotations

import gzip
import json
import re
import sqlite3
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

DOMAIN = "tpkernels"  # as in csrc/engine/nvtx.h
PUSH_POP, START_END, DOMAIN_CREATE = 59, 60, 75  # NVTX_EVENTS.eventType

COLLECTIVE = re.compile(r"nccl|(one|two)_shot|all_?reduce|all_?gather|reduce_?scatter", re.I)
GEMM = re.compile(r"gemm|column_linear_act|gemv|nvjet|xmma|matmul|splitk|triton_tem", re.I)
ATTENTION = re.compile(r"flash|fmha|attention|attn", re.I)  # whose template arguments name GEMMs


class Kernel(NamedTuple):
    """A GPU kernel of a trace; process 0 where the trace has one only."""

    process: int
    device: int
    start: int
    end: int
    name: str


class Range(NamedTuple):
    """An NVTX range on the host."""

    start: int
    end: int
    name: str


Interval = tuple[int, int]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the same time as disjoint intervals in order.

    Touching intervals become one, empty ones vanish.
    """
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[0] < i[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def length(disjoint: Iterable[Interval]) -> int:
    """Return the total length of disjoint intervals."""
    return sum(end - start for start, end in disjoint)


def intersection(a: list[Interval], b: list[Interval]) -> list[Interval]:
    """Return the time that two unions have in common."""
    common, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            common.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def kind_of(kernel: str) -> str:
    """Return "gemm", "collective" or "other", by the kernel's name.

    A kernel that is both, such as a fused GEMM + all-reduce, is a GEMM.
    """
    name = kernel.replace("(anonymous namespace)", "").partition("(")[0]
    if GEMM.search(name) and not ATTENTION.search(name):
        return "gemm"
    return "collective" if COLLECTIVE.search(name) else "other"


def report(kernels: list[Kernel], ranges: list[Range]) -> dict[str, Any]:
    """Return the figures of a trace.

    `devices` has for each device of each process: `collective_ns`, the time in which at least one
    collective ran; `hidden_ns`, the part of it in which a kernel that is no collective ran too;
    `exposed_ns`, the rest; and `gemm_ns`, the time in which a GEMM ran. `overlap` has their sums
    and `efficiency`, hidden / collective (None without collectives).
    """
    by_name, by_kernel = defaultdict(list), defaultdict(list)
    devices: dict[tuple[int, int], dict[str, list[Interval]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for r in sorted(ranges):
        by_name[r.name].append(r.end - r.start)
    for k in kernels:
        by_kernel[kind_of(k.name), k.name].append(k.end - k.start)
        devices[k.process, k.device][kind_of(k.name)].append((k.start, k.end))

    rows = []
    for (process, device), times in sorted(devices.items()):
        collective, compute = union(times["collective"]), union(times["gemm"] + times["other"])
        total, hidden = length(collective), length(intersection(collective, compute))
        figures = dict(
            collective_ns=total,
            hidden_ns=hidden,
            exposed_ns=total - hidden,
            gemm_ns=length(union(times["gemm"])),
        )
        rows.append(dict(process=process, device=device, **figures))
    overlap = {
        key: sum(row[key] for row in rows)
        for key in ("collective_ns", "hidden_ns", "exposed_ns", "gemm_ns")
    }
    total = overlap["collective_ns"]
    return {
        "ranges": [dict(name=name, count=len(t), total_ns=sum(t)) for name, t in by_name.items()],
        "kernels": sorted(
            (
                dict(kind=kind, name=name, count=len(t), total_ns=sum(t))
                for (kind, name), t in by_kernel.items()
            ),
            key=lambda k: -k["total_ns"],
        ),
        "devices": rows,
        "overlap": {**overlap, "efficiency": overlap["hidden_ns"] / total if total else None},
    }


def read_trace(path: Path) -> tuple[list[Kernel], list[Range]]:
    """Return the GPU kernels of a trace, and the ranges of the domain "tpkernels" in it.

    Raises:
        ValueError: the file is missing, is no trace, or holds neither kernels nor ranges.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.name.endswith((".json", ".json.gz")):
        kernels, ranges = _read_chrome(path), []
    else:
        kernels, ranges = _read_nsys(path)
    if not kernels and not ranges:
        raise ValueError(
            f"{path}: no GPU kernels and no ranges of the NVTX domain {DOMAIN!r}: "
            "was it recorded on CPUs, or around no step?"
        )
    return kernels, ranges


def _read_nsys(path: Path) -> tuple[list[Kernel], list[Range]]:
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise ValueError(
                f"{path}: neither an SQLite database nor .json: "
                f"export a report with `nsys export --type sqlite {path}`"
            )
    with closing(sqlite3.connect(path.absolute().as_uri() + "?mode=ro", uri=True)) as db:
        try:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
            # Tables are made only where there is something to put in them.
            if not tables & {"NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL"}:
                raise ValueError(
                    f"{path}: has neither NVTX_EVENTS nor CUPTI_ACTIVITY_KIND_KERNEL: record with "
                    "`nsys profile --trace=cuda,nvtx` and export with `nsys export --type sqlite`"
                )
            kernels = (
                db.execute(KERNELS).fetchall() if "CUPTI_ACTIVITY_KIND_KERNEL" in tables else []
            )
            ranges = db.execute(RANGES, (DOMAIN,)).fetchall() if "NVTX_EVENTS" in tables else []
        except sqlite3.Error as error:
            raise ValueError(
                f"{path}: not an export that can be read ({error}): "
                "export it again with `nsys export --type sqlite`"
            ) from None
    return [Kernel(*row) for row in kernels], [Range(*row) for row in ranges]


# A globalPid is a serialized process id: / 0x1000000 % 0x1000000 is the process. A globalTid has
# it too.
KERNELS = """
    SELECT k.globalPid / 0x1000000 % 0x1000000, k.deviceId, k.start, k."end", s.value
    FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.demangledName
"""
# Texts are inline or strings of their own; a domain's number is one process's.
RANGES = f"""
    WITH events AS (
        SELECT e.start, e."end", e.eventType, e.domainId, e.globalTid / 0x1000000 AS process,
            coalesce(e.text, s.value) AS name
        FROM NVTX_EVENTS e LEFT JOIN StringIds s ON s.id = e.textId
    ), domains AS (
        SELECT DISTINCT process, domainId FROM events
        WHERE eventType = {DOMAIN_CREATE} AND name = ?
    )
    SELECT start, "end", name FROM events JOIN domains USING (process, domainId)
    WHERE eventType IN ({PUSH_POP}, {START_END}) AND "end" IS NOT NULL
"""


def _read_chrome(path: Path) -> list[Kernel]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
            events = json.load(file)
        events = events["traceEvents"] if isinstance(events, dict) else events
        return [
            Kernel(
                0,
                e["args"]["device"],
                round(e["ts"] * 1000),
                round((e["ts"] + e["dur"]) * 1000),
                e["name"],
            )
            for e in events
            if e.get("cat") == "kernel" and e.get("ph") == "X"
        ]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a Chrome trace that torch.profiler wrote "
            f"({type(error).__name__}: {error})"
        ) from None


def print_report(result: dict[str, Any], console: Console) -> None:
    """Print the figures of `report` as tables."""
    if result["ranges"]:
        table = _table("Ranges on the host", "range", "count", "ms")
        for r in result["ranges"]:
            table.add_row(escape(r["name"]), str(r["count"]), _ms(r["total_ns"]))
        console.print(table)
    if not result["kernels"]:
        console.print("No GPU kernels in this trace: nothing to say about overlap.")
        return
    table = _table("GPU kernels, the longest of each kind", "kernel", "kind", "count", "ms")
    for kind in ("collective", "gemm", "other"):
        for k in [k for k in result["kernels"] if k["kind"] == kind][:8]:
            table.add_row(escape(k["name"]), kind, str(k["count"]), _ms(k["total_ns"]))
    console.print(table)
    title = "Time in which collectives ran: hidden under other kernels, or exposed"
    table = _table(
        title, "device", "collectives, ms", "hidden", "exposed", "efficiency", "GEMMs, ms"
    )
    rows = [(f"{row['device']} of process {row['process']}", row) for row in result["devices"]]
    if len(rows) > 1:
        rows.append(("all", result["overlap"]))
    for place, row in rows:
        total, hidden, exposed, gemm = (
            row[key] for key in ("collective_ns", "hidden_ns", "exposed_ns", "gemm_ns")
        )
        table.add_row(
            place,
            _ms(total),
            _ms(hidden),
            _ms(exposed),
            f"{hidden / total:.1%}" if total else "no collectives",
            _ms(gemm),
        )
    console.print(table)


def _ms(ns: int) -> str:
    return f"{ns / 1e6:.3f}"


def _table(title: str, name: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    # Kernels' names fill screens.
    table.add_column(name, overflow="ellipsis", no_wrap=True, max_width=48)
    for column in columns:
        table.add_column(column, justify="right")
    return table
