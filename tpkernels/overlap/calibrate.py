"""tune: measures GEMMs, the group's link, and on demand the ops themselves, for schedules."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..group import Group, GroupLike, resolve_group
from ..kernels import registration
from ..process_group import broadcast_object
from .calibration_cache import Calibration, CalibrationKey, install, save
from .cost_model import Curve, GemmShape, Timings, chunk_rows, pipeline_seconds

_ops = torch.ops.tpkernels

ROUNDS = 5
GEMM_SIZE = {"cpu": 2048, "cuda": 4096}  # k and n of the measured GEMMs
GEMM_ROWS = {
    "cpu": (16, 64, 128, 256, 512, 1024, 2048),
    "cuda": (128, 256, 512, 1024, 2048, 4096, 8192),
}
ALL_REDUCE_BYTES = tuple(4096 * 4**i for i in range(7))  # 4 KB to 16 MB
PROBE_BYTES = 16 << 20  # of the all-reduce whose contention with a concurrent GEMM is measured
PROBE_CHUNKS = 4
MAX_CANDIDATES = 3  # chunked schedules that are measured for a shape: the fastest predicted ones

Key = TypeVar("Key", bound=Hashable)
Calls = Mapping[Key, Callable[[], object]]


class _Bench(NamedTuple):
    """The place and dtype of a measurement."""

    group: Group
    device: torch.device
    dtype: torch.dtype

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)


def tune(
    group: GroupLike = None,
    shapes: Iterable[tuple[int, int, int]] = (),
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
) -> Calibration:
    """Measure this machine's GEMMs and the group's link, and choose schedules from that.

    The first rank's measurements count. It saves them in the user's cache folder, in place of
    earlier ones, where `init_mesh` finds them. All ranks use them from now on. It takes some
    seconds. On GPUs it takes a minute or two, as the kernels' configurations are measured too.

    Collective: every rank of the group must call it, with nothing else in flight.

    Args:
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `init_mesh`.
        shapes: (rows, in_features, out_features) of layers, in_features being a rank's shard. For
            these the row-parallel forward and a column-parallel backward (whose input gradient is
            [rows, out_features]) are timed with the chunk counts that the model thinks best, and
            the times replace its predictions.
        dtypes: what to measure in. Other dtypes' schedules stay as they are without it.

    Returns:
        The calibration in force.

    Raises:
        ValueError: a shape that is not three ints of at least 1; before any communication.
        RuntimeError: a CUDA graph is being captured.

    Example:
        >>> tpk.tune(mesh["tp"], shapes=[(4096, 2048, 8192)])  # doctest: +SKIP
    """
    shapes = [_check_shape(shape) for shape in shapes]
    group = resolve_group(group)
    device = torch.device(group.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "tune() measures, which a CUDA graph cannot record: call it before the capture"
            )
        if registration.available():
            from ..kernels import tuning  # imports Triton

            tuning.tune(group.pg, device=device)
    key = CalibrationKey.of(group)
    timings = {dtype: _measure(_Bench(group, device, dtype), shapes) for dtype in dtypes}
    calibration = Calibration(
        f"{key.device}, {key.link}, {key.ranks} ranks",
        datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        timings,
    )
    if group.rank == 0:
        save(calibration, key)
    installed = install(calibration, group)
    assert installed is not None
    return installed


def _check_shape(shape) -> tuple[int, int, int]:
    is_triple = isinstance(shape, (tuple, list)) and len(shape) == 3
    if not is_triple or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise ValueError(
            "shapes must be (rows, in_features of a rank, out_features), ints of at least 1, "
            f"got {shape!r}"
        )
    m, k, n = shape
    return m, k, n


def _measure(bench: _Bench, shapes: Iterable[tuple[int, int, int]]) -> Timings:
    group, device, dtype = bench
    size = GEMM_SIZE[device.type]
    sizes = {(size, size), *(shape[1:] for shape in shapes)}
    gemms = {(k, n): _gemm_curve(k, n, bench) for k, n in sizes}
    all_reduces = chunked_all_reduces = _all_reduce_curve(group.channels[0], bench)
    if group.has_chunked_group:
        chunked_all_reduces = _all_reduce_curve(group.channels[1], bench)
    contention = _contention(gemms[size, size], chunked_all_reduces(PROBE_BYTES), bench)
    timings = Timings(dtype.itemsize, gemms, all_reduces, chunked_all_reduces, contention)
    measured = {}
    if group.size > 1:
        for m, k, n in shapes:
            for weight_grad in (False, True):
                shape = GemmShape(m, k, n, weight_grad)
                measured[shape] = _op_seconds(shape, timings, bench)
    return replace(timings, measured=measured)


def _gemm_curve(k: int, n: int, bench: _Bench) -> Curve:
    """Measure GEMMs on every rank at once, as they run in a forward."""
    rows = GEMM_ROWS[bench.device.type]
    x, weight = bench.random(rows[-1], k), bench.random(n, k)
    calls: Calls[int] = {m: lambda m=m: _linear(x[:m], weight) for m in rows}
    return Curve.never_less_efficient(_median_seconds(calls, bench).items())


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute x @ weight^T as the layers do."""
    if x.device.type == "cpu":
        return _ops.linear(x, weight, None, False)
    return F.linear(x, weight)


def _all_reduce_curve(name: str, bench: _Bench) -> Curve:
    itemsize = bench.dtype.itemsize
    buffer = bench.random(ALL_REDUCE_BYTES[-1] // itemsize).zero_()
    calls: Calls[int] = {
        nbytes: lambda nbytes=nbytes: _ops.all_reduce_(
            buffer[: nbytes // itemsize], name, "sum", "tune"
        )
        for nbytes in ALL_REDUCE_BYTES
    }
    return Curve(tuple(_median_seconds(calls, bench, start_together=True).items()))


def _contention(gemm: Curve, all_reduce_seconds: float, bench: _Bench) -> float:
    """Measure the GEMM slowdown, in seconds, per concurrently all-reduced byte.

    It is what the op takes in chunks beyond a pipeline without contention. The GEMM takes about
    1.5 times as long as its all-reduce, so that either is worth hiding. All parts are timed in
    each round: a machine that is busy with something else slows all of them alike.

    Args:
        gemm: seconds of the GEMM [m, GEMM_SIZE] x [GEMM_SIZE, GEMM_SIZE], by rows.
        all_reduce_seconds: of PROBE_BYTES.
        bench: where to measure.
    """
    group, device, dtype = bench
    if group.size == 1:
        return 0.0
    n = GEMM_SIZE[device.type]
    m = PROBE_BYTES // (n * dtype.itemsize)
    part = min(1.0, max(1 / 32, 1.5 * all_reduce_seconds / gemm(m)))
    k = broadcast_object(group.pg, math.ceil(part * n))
    x, weight = bench.random(m, k), bench.random(n, k)
    buffer = bench.random(m, n).zero_()
    name = group.channels[1]
    chunks = chunk_rows(m, PROBE_CHUNKS, n * dtype.itemsize)
    slowdowns = []
    for _ in range(2 * ROUNDS + 1):
        gemm_seconds = _seconds(lambda: _linear(x, weight), bench, start_together=True)
        link_seconds = _seconds(
            lambda: _ops.all_reduce_(buffer, name, "sum", "tune"), bench, start_together=True
        )
        op_seconds = _seconds(
            lambda: _ops.row_linear(x, weight, None, None, name, PROBE_CHUNKS, "tune"),
            bench,
            start_together=True,
        )
        without_contention = pipeline_seconds(
            chunks,
            gemm=lambda rows, seconds=gemm_seconds: seconds * rows / m,
            all_reduce=lambda rows, seconds=link_seconds: seconds * rows / m,
            contention=lambda rows: 0.0,
        )
        slowdowns.append(op_seconds - without_contention)
    slowdown = max(0.0, statistics.median(slowdowns[1:]))  # the first round warms up
    # The last chunk's all-reduce overlaps nothing.
    overlapped_bytes = PROBE_BYTES * (m - chunks[-1]) / m
    return slowdown / overlapped_bytes


def _op_seconds(shape: GemmShape, timings: Timings, bench: _Bench) -> dict[int, float]:
    """Return seconds of the layer's op by the number of chunks, one and the best candidates."""
    predicted = timings.predict(shape)
    chunked = sorted((n for n in predicted if n > 1), key=lambda n: predicted[n])
    candidates = [1, *sorted(chunked[:MAX_CANDIDATES])]
    rounds = 3 if predicted[1] > 0.5 else ROUNDS
    candidates, rounds = broadcast_object(bench.group.pg, (candidates, rounds))
    m, k, n, weight_grad = shape
    a = bench.random(m, k)
    if weight_grad:
        x, weights = bench.random(m, n), [bench.random(k, n)]
    else:
        weight = bench.random(n, k)

    def call(chunks: int) -> None:
        name = bench.group.channels[chunks > 1]
        if weight_grad:
            _ops.column_linear_backward(
                [a], x, weights, True, [True], [False], name, chunks, "tune"
            )
        else:
            _ops.row_linear(a, weight, None, None, name, chunks, "tune")

    calls: Calls[int] = {chunks: lambda chunks=chunks: call(chunks) for chunks in candidates}
    return _median_seconds(calls, bench, start_together=True, rounds=rounds)


def _median_seconds(
    calls: Calls[Key],
    bench: _Bench,
    start_together: bool = False,
    rounds: int = ROUNDS,
) -> dict[Key, float]:
    """Return each call's median seconds over rounds in which they take turns.

    A round before them warms up.

    Args:
        calls: by key.
        bench: where to measure.
        start_together: the ranks meet before each call.
        rounds: how many.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds + 1):
        for key, call in calls.items():
            times[key].append(_seconds(call, bench, start_together))
    return {key: statistics.median(seconds[1:]) for key, seconds in times.items()}


def _seconds(call: Callable[[], object], bench: _Bench, start_together: bool) -> float:
    if start_together:
        dist.barrier(bench.group.pg)
    if bench.device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(bench.device)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize(bench.device)
    return begin.elapsed_time(end) / 1e3
