"""Seconds and traffic of collectives."""

from __future__ import annotations

import bisect
import csv
import functools
import math
from typing import NamedTuple

from .constants import Constants
from .job import Job
from .layout import Layout
from .memory import all_reduce_bytes, local_parameters
from .model import DATA


class _Curve(NamedTuple):
    """The measured all-reduces of 8 H200s."""

    log_sizes: tuple[float, ...]  # logarithms of the sizes in bytes
    shares: tuple[float, ...]  # shares of the largest size's bus bandwidth
    bus_bytes_per_s: float  # that bandwidth


@functools.cache
def _curve() -> _Curve:
    with (DATA / "measured" / "allreduce_busbw.csv").open() as file:
        rows = [
            (float(row["message_MiB"]) * 2**20, float(row["busbw_GBps"]) * 1e9)
            for row in csv.DictReader(file)
            if row["system"] == "8xH200 NVLink SHARP"
        ]
    rows.sort()
    best = rows[-1][1]
    log_sizes = tuple(math.log(size) for size, _ in rows)
    return _Curve(log_sizes, tuple(bandwidth / best for _, bandwidth in rows), best)


def bus_share(size: float, bus_bytes_per_s: float) -> float:
    """Return the share of a link's bus bandwidth that an all-reduce reaches.

    It is the measured share of 8 H200s at the size that takes as long there: between two points by
    the logarithm of the size, below the first in proportion to the size (a constant time).

    Args:
        size: bytes of the all-reduce.
        bus_bytes_per_s: the link's bus bandwidth at large sizes.
    """
    logs, shares, reference = _curve()
    at = math.log(max(size, 1.0) * reference / bus_bytes_per_s)
    if at <= logs[0]:
        return shares[0] * math.exp(at - logs[0])
    if at >= logs[-1]:
        return shares[-1]
    i = bisect.bisect_right(logs, at)
    part = (at - logs[i - 1]) / (logs[i] - logs[i - 1])
    return shares[i - 1] + part * (shares[i] - shares[i - 1])


def ring_seconds(size: float, ranks: int, passes: int, bus: float, c: Constants) -> float:
    """Predict a ring collective's seconds.

    Args:
        size: bytes of the tensor.
        ranks: ranks of the group.
        passes: 2 for an all-reduce, 1 for a reduce-scatter or an all-gather.
        bus: bytes a second of the link.
        c: the GPU's constants.
    """
    if ranks == 1 or not size:
        return 0.0
    return c.reduce + passes * (ranks - 1) / ranks * size / (bus * bus_share(size, bus))


def _bus(job: Job, layout: Layout, kind: str, ports: int, c: Constants) -> float:
    """Return the bandwidth of the "tp" or "dp" group, which has `ports` ports of a node."""
    hardware = job.hardware
    bus = hardware.link.bus_bytes_per_s * c.link
    if layout.crosses(kind, hardware):
        bus = min(bus, ports * hardware.network.bus_bytes_per_s * c.network)
    return bus


def tensor_parallel_seconds(job: Job, layout: Layout, c: Constants) -> float:
    """Predict the seconds of one TP all-reduce of a micro-batch."""
    bus = _bus(job, layout, "tp", job.hardware.gpus_per_node, c)
    return ring_seconds(all_reduce_bytes(job, layout), layout.tp, 2, bus, c)


def pipeline_seconds(job: Job, layout: Layout, c: Constants) -> float:
    """Predict the seconds of a stage's sends of one micro-batch, forward and backward."""
    if layout.pp == 1:
        return 0.0
    hardware = job.hardware
    if layout.crosses("pp", hardware):
        bandwidth = hardware.network.bus_bytes_per_s * c.network
    else:
        bandwidth = hardware.link.bus_bytes_per_s * c.link
    one = c.send + all_reduce_bytes(job, layout) / layout.tp / bandwidth
    return 2 * layout.interleave * one


def data_parallel_seconds(
    job: Job, layout: Layout, c: Constants, compute: float
) -> tuple[float, float]:
    """Predict the data-parallel collectives of a step.

    Args:
        job, layout, c: the job, its layout and the GPU's constants.
        compute: seconds of the step's compute.

    Returns:
        Seconds of all of them, and of the part that overlaps with compute.
    """
    dp = layout.dp
    m = layout.micro_batches
    if dp == 1:
        return 0.0, 0.0
    ranks_per_node = max(1, job.hardware.gpus_per_node // layout.tp)
    bus = _bus(job, layout, "dp", ranks_per_node, c)
    size = job.element_bytes * local_parameters(job.model, layout)
    one_pass = ring_seconds(size, dp, 1, bus, c)
    total = {
        0: ring_seconds(size, dp, 2, bus, c),
        1: 2 * one_pass,
        2: (m + 1) * one_pass,
        3: 3 * m * one_pass,
    }[layout.zero]
    if job.is_megatron:
        return total, 0.0
    # They overlap with the last micro-batch's backward pass, two thirds of its compute. ZeRO-2
    # sends under every micro-batch's backward pass, ZeRO-3 under the forward passes too.
    window = compute * {3: 1, 2: 2 / 3}.get(layout.zero, 2 / 3 / m)
    return total, min(total, window) * c.hidden


class Traffic(NamedTuple):
    """One kind of collective in one GPU's step.

    The fields are keys of the JSON output.
    """

    calls: int
    bytes_each: int
    bytes: int
    link: str


def traffic(job: Job, layout: Layout) -> dict[str, Traffic]:
    """Count the collectives of one GPU's step, by name."""
    model = job.model
    m = layout.micro_batches
    hardware = job.hardware
    size = all_reduce_bytes(job, layout)
    parameters = job.element_bytes * local_parameters(model, layout)
    found: dict[str, Traffic] = {}

    def add(kind: str, collective: str, calls: int, size: int) -> None:
        link = hardware.network if layout.crosses(kind, hardware) else hardware.link
        found[f"{kind.upper()} {collective}"] = Traffic(calls, size, calls * size, link.kind)

    if layout.tp > 1:
        calls = m * layout.blocks(model) * (6 if layout.recompute == "full" else 4)
        if layout.sequence_parallel:
            add("tp", "reduce-scatter", calls, size)
            add("tp", "all-gather", calls, size)
        else:
            add("tp", "all-reduce", calls, size)
    if layout.pp > 1:
        add("pp", "send", 2 * m * layout.interleave, size // layout.tp)
    if layout.dp > 1 and layout.zero == 0:
        add("dp", "all-reduce of gradients", 1, parameters)
    elif layout.dp > 1:
        add("dp", "reduce-scatter of gradients", m if layout.zero > 1 else 1, parameters)
        add("dp", "all-gather of parameters", 2 * m if layout.zero == 3 else 1, parameters)
    return found
