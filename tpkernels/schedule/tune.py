"""Measures what schedules are made from: GEMMs, the group's link, and on demand the ops themselves."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timezone

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..group import Group, resolve_group
from ..kernels import registration
from ..peer_memory import gather_objects
from .model import Curve, Shape, Timings, chunk_rows, pipeline
from .table import Place, Table, install, save

OPS = torch.ops.tpkernels
ROUNDS = 5
FEATURES = {"cpu": 2048, "cuda": 4096}  # inner and outer size of the GEMMs
ROWS = {"cpu": (16, 64, 128, 256, 512, 1024, 2048), "cuda": (128, 256, 512, 1024, 2048, 4096, 8192)}
MESSAGES = tuple(4096 * 4**i for i in range(7))  # bytes: 4 KB to 16 MB
BESIDE = 16 << 20  # bytes of the all-reduce that is watched running beside a GEMM
CALIBRATED = 4  # chunks of that
TRIED = 3  # chunked schedules that are measured for a shape: those predicted to be the fastest


def tune(
    group=None,
    shapes: Iterable[tuple[int, int, int]] = (),
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Table:
    """Measures this machine's GEMMs and the group's link, saves that, and makes all ranks take their schedules from it from now on.

    Every rank of the group must call it, with nothing else in flight. The first rank's measurements count; it saves them in the user's
    cache folder, in place of earlier ones, where `init_mesh` finds them. Takes some seconds; on GPUs a minute or two, the kernels'
    configurations being measured too.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.
        shapes: (rows, in_features, out_features), in_features being a rank's share: for these the row-parallel forward and a
            column-parallel backward (whose input's gradient is [rows, out_features]) are timed with the chunk counts that the
            model thinks best, and the times replace its predictions.
        dtypes: what to measure in. Other dtypes' schedules stay as they are without a table.

    Raises:
        ValueError: a shape that is not three ints of at least 1; before any communication.
        RuntimeError: a CUDA graph is being captured.
    """
    shapes = [_check_shape(shape) for shape in shapes]
    group = resolve_group(group)
    device = torch.device(
        group.device_type, torch.cuda.current_device() if group.device_type == "cuda" else None
    )
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "tune() measures, which a CUDA graph cannot record: call it before the capture"
        )
    if device.type == "cuda" and registration.available():
        from ..kernels import tuning  # imports Triton

        tuning.tune(group.pg, device=device)
    place = Place.of(group)
    timings = {dtype: _measure(dtype, shapes, group, device) for dtype in dtypes}
    table = Table(
        f"{place.device}, {place.link}, {place.ranks} ranks",
        datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        timings,
    )
    if group.rank == 0:
        save(table, place)
    return install(table, group)


def _check_shape(shape) -> tuple[int, int, int]:
    if (
        not isinstance(shape, (tuple, list))
        or len(shape) != 3
        or not all(isinstance(size, int) and size >= 1 for size in shape)
    ):
        raise ValueError(
            f"shapes must be (rows, in_features of a rank, out_features), ints of at least 1, got {shape!r}"
        )
    return tuple(shape)


def _measure(dtype: torch.dtype, shapes, group: Group, device: torch.device) -> Timings:
    size = FEATURES[device.type]
    gemms = {
        (inner, features): _gemms(inner, features, dtype, device)
        for inner, features in {(size, size), *(s[1:] for s in shapes)}
    }
    messages = chunked = _messages(dtype, group, group.name, device)
    if group.has_chunked_group:
        chunked = _messages(dtype, group, group.chunked_name, device)
    timings = Timings(
        dtype.itemsize,
        gemms,
        messages,
        chunked,
        _steal(dtype, group, device, gemms[size, size], chunked(BESIDE)),
    )
    measured = {}
    for rows, inner, features in shapes if group.size > 1 else ():
        for shape in (Shape(rows, inner, features, False), Shape(rows, inner, features, True)):
            measured[shape] = _ops(shape, timings, dtype, group, device)
    return replace(timings, measured=measured)


def _gemms(inner: int, features: int, dtype: torch.dtype, device: torch.device) -> Curve:
    """On every rank at once, as they run in a forward."""
    rows = ROWS[device.type]
    x, weight = (
        torch.randn(rows[-1], inner, dtype=dtype, device=device),
        torch.randn(features, inner, dtype=dtype, device=device),
    )
    calls = {n: lambda n=n: _linear(x[:n], weight) for n in rows}
    return Curve.never_less_efficient(_medians(calls, device).items())


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As the layers compute it."""
    return OPS.linear(x, weight, None, False) if x.device.type == "cpu" else F.linear(x, weight)


def _messages(dtype: torch.dtype, group: Group, name: str, device: torch.device) -> Curve:
    buffer = torch.zeros(MESSAGES[-1] // dtype.itemsize, dtype=dtype, device=device)
    calls = {
        n: lambda n=n: OPS.all_reduce_(buffer[: n // dtype.itemsize], name, "sum", "tune")
        for n in MESSAGES
    }
    return Curve(tuple(_medians(calls, device, group).items()))


def _steal(
    dtype: torch.dtype, group: Group, device: torch.device, gemm: Curve, message: float
) -> float:
    """Seconds by which GEMMs take longer for each byte that is all-reduced beside them: what the op itself takes in chunks beyond a
    pipeline that costs nothing, of a GEMM about 1.5 times as long as its all-reduce, so that either is worth hiding.

    gemm: of the reference size, by rows; message: the all-reduce of BESIDE bytes, in seconds. The parts are timed again in each round: a
    machine that is busy with something else slows all of them alike.
    """
    if group.size == 1:
        return 0.0
    features = FEATURES[device.type]
    rows = BESIDE // (features * dtype.itemsize)
    inner = math.ceil(min(1.0, max(1 / 32, 1.5 * message / gemm(rows))) * features)
    inner = gather_objects(group.pg, inner)[0]
    x, weight = (
        torch.randn(rows, inner, dtype=dtype, device=device),
        torch.randn(features, inner, dtype=dtype, device=device),
    )
    buffer = torch.zeros(rows, features, dtype=dtype, device=device)
    name, losses = group.channel(2), []
    calls = (
        lambda: _linear(x, weight),
        lambda: OPS.all_reduce_(buffer, name, "sum", "tune"),
        lambda: OPS.row_linear(x, weight, None, None, name, CALIBRATED, "tune"),
    )
    sizes = chunk_rows(rows, CALIBRATED, features * dtype.itemsize)
    for _ in range(2 * ROUNDS + 1):
        times = []
        for call in calls:
            dist.barrier(group.pg)
            times.append(_seconds(call, device))
        alone, sent, chunked = times
        free = pipeline(sizes, lambda n: alone * n / rows, lambda n: sent * n / rows, lambda n: 0.0)  # noqa: B023
        losses.append(chunked - free)
    return max(0.0, statistics.median(losses[1:])) * rows / (rows - sizes[-1]) / BESIDE


def _ops(
    shape: Shape, timings: Timings, dtype: torch.dtype, group: Group, device: torch.device
) -> dict[int, float]:
    predicted = timings.predict(shape)
    chunked = sorted((n for n in predicted if n > 1), key=predicted.get)[:TRIED]
    rounds = 3 if predicted[1] > 0.5 else ROUNDS
    candidates, rounds = gather_objects(group.pg, ([1, *sorted(chunked)], rounds))[0]
    rows, inner, features, backward = shape
    a = torch.randn(rows, inner, dtype=dtype, device=device)
    weight = (
        torch.randn(inner, features, dtype=dtype, device=device)
        if backward
        else torch.randn(features, inner, dtype=dtype, device=device)
    )
    x = torch.randn(rows, features, dtype=dtype, device=device) if backward else None

    def call(chunks):
        name = group.channel(chunks)
        if backward:
            OPS.column_linear_backward(
                [a], x, [weight], True, [True], [False], name, chunks, "tune"
            )
        else:
            OPS.row_linear(a, weight, None, None, name, chunks, "tune")

    return _medians(
        {chunks: lambda chunks=chunks: call(chunks) for chunks in candidates}, device, group, rounds
    )


def _medians(
    calls: dict[int, Callable[[], object]],
    device: torch.device,
    group: Group | None = None,
    rounds: int = ROUNDS,
) -> dict[int, float]:
    """Seconds of each call, the median of rounds in which they take turns, after one that does not count. With `group` they start together."""
    times: dict[int, list[float]] = {key: [] for key in calls}
    for _ in range(rounds + 1):
        for key, call in calls.items():
            if group is not None:
                dist.barrier(group.pg)
            times[key].append(_seconds(call, device))
    return {key: statistics.median(seconds[1:]) for key, seconds in times.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3
