"""The cost model: time of a GEMM and its all-reduce in row chunks, from measured curves."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .. import _C

CHUNK_COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # the candidates
MIN_ROWS = 128  # of a chunk: below, GEMMs lose more than a shorter last all-reduce gains
# Minimum speed-up to use more than one chunk: predicted, by about the model's error, or measured.
PREDICTED_GAIN = 0.05
MEASURED_GAIN = 0.02


class GemmShape(NamedTuple):
    """A layer's GEMM [m, k] x [k, n], whose result is all-reduced.

    Attributes:
        m: rows (tokens).
        k: inner size, the largest rank's: ranks with uneven shards decide alike.
        n: features of the result.
        weight_grad: the GEMM is a column-parallel layer's backward, which the weight's gradient
            [k, m] x [m, n] follows. The last chunks can hide under that.
    """

    m: int
    k: int
    n: int
    weight_grad: bool


@dataclass(frozen=True)
class Curve:
    """Seconds by size, linear between measured points.

    It is constant before the first point, and proportional to the size beyond the last.
    """

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def never_less_efficient(points: Iterable[tuple[float, float]]) -> Curve:
        """Make the curve of measured GEMMs, in which more rows never take longer each.

        Noise must not make it look like a gain to cut a GEMM.
        """
        smoothed, seconds_per_row = [], math.inf
        for size, seconds in sorted(points):
            seconds_per_row = min(seconds_per_row, seconds / size)
            smoothed.append((size, size * seconds_per_row))
        return Curve(tuple(smoothed))

    def __call__(self, size: float) -> float:
        """Return the seconds at `size`."""
        i = bisect_left(self.points, (size, 0.0))
        if i == 0:
            return self.points[0][1]
        size_before, seconds_before = self.points[i - 1]
        if i == len(self.points):
            return seconds_before * size / size_before
        size_after, seconds_after = self.points[i]
        # Weights of both ends, rather than a rise from the first, give a measured point exactly.
        weight = (size - size_before) / (size_after - size_before)
        return (1 - weight) * seconds_before + weight * seconds_after


def pipeline_seconds(
    chunks: Sequence[int],
    gemm: Callable[[int], float],
    all_reduce: Callable[[int], float],
    contention: Callable[[int], float],
    trailing: float = 0.0,
) -> float:
    """Return the seconds of GEMMs in sequence, each followed by its all-reduce.

    All-reduces run in sequence too, concurrently with the GEMMs that follow.

        | GEMM 0 | GEMM 1 | GEMM 2 | trailing |
                 | all-reduce 0 | all-reduce 1 | all-reduce 2 |

    Args:
        chunks: rows of each GEMM.
        gemm: a chunk's GEMM, in seconds by its rows.
        all_reduce: a chunk's all-reduce, in seconds by its rows.
        contention: delay that a chunk's all-reduce causes to concurrent GEMMs, in seconds by its
            rows.
        trailing: seconds of work that follows the last GEMM.
    """
    compute = link = 0.0
    for i, m in enumerate(chunks):
        compute += gemm(m)
        link = max(compute, link) + all_reduce(m)
        if i + 1 < len(chunks) or trailing:
            compute += contention(m)
    return max(compute + trailing, link)


def chunk_rows(m: int, chunks: int, row_bytes: int) -> list[int]:
    """Return the rows of each chunk, as the ops cut them."""
    bounds = _C.chunk_bounds(m, chunks, row_bytes)
    return [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True)
class Timings:
    """Measurements in one dtype.

    Attributes:
        itemsize: bytes of an element.
        gemms: (k, n) -> seconds by rows.
        all_reduces: seconds of an all-reduce by bytes.
        chunked_all_reduces: the same through the group's communicator for chunks.
        contention: GEMM slowdown, in seconds, per concurrently all-reduced byte.
        measured: shape -> number of chunks -> seconds of the layer's op itself.
    """

    itemsize: int
    gemms: dict[tuple[int, int], Curve]
    all_reduces: Curve
    chunked_all_reduces: Curve
    contention: float
    measured: dict[GemmShape, dict[int, float]] = field(default_factory=dict)

    def gemm(self, m: int, k: int, n: int) -> float:
        """Return the seconds of a GEMM, in proportion to the nearest measured size."""

        def distance(size: tuple[int, int]) -> float:
            return abs(math.log(size[0] / k)) + abs(math.log(size[1] / n))

        nearest = min(self.gemms, key=distance)
        return self.gemms[nearest](m) * (k * n) / math.prod(nearest)

    def predict(self, shape: GemmShape) -> dict[int, float]:
        """Return seconds by the number of chunks, for those that leave a chunk MIN_ROWS rows."""
        m, k, n, weight_grad = shape
        row_bytes = n * self.itemsize
        trailing = self.gemm(m, k, n) if weight_grad else 0.0
        predicted = {}
        for count in CHUNK_COUNTS:
            if count > 1 and m < count * MIN_ROWS:
                continue
            all_reduces = self.all_reduces if count == 1 else self.chunked_all_reduces
            predicted[count] = pipeline_seconds(
                chunk_rows(m, count, row_bytes),
                gemm=lambda rows: self.gemm(rows, k, n),
                all_reduce=lambda rows, curve=all_reduces: curve(rows * row_bytes),
                contention=lambda rows: self.contention * rows * row_bytes,
                trailing=trailing,
            )
        return predicted

    def decide(self, shape: GemmShape) -> tuple[int, str]:
        """Return the number of chunks and why; measurements of the op count before predictions."""
        times, min_gain, how = self.measured.get(shape), MEASURED_GAIN, "measured"
        if not times:
            times, min_gain, how = self.predict(shape), PREDICTED_GAIN, "predicted"
        if len(times) == 1:
            return 1, f"{shape.m} rows are fewer than two chunks of {MIN_ROWS}"
        best = min(times, key=lambda chunks: times[chunks])
        gain = 1 - times[best] / times[1]
        if best == 1:
            return 1, f"one chunk is the fastest, {how}"
        if gain < min_gain:
            return 1, (
                f"{best} chunks would save {gain:.1%}, {how}, "
                f"less than the {min_gain:.0%} that is asked for"
            )
        return best, f"{best} chunks save {gain:.1%} of one chunk's time, {how}"

    @property
    def summary(self) -> str:
        """One line of figures: GEMM speed, all-reduce latency and bandwidth, contention."""
        (k, n), curve = next(iter(self.gemms.items()))
        m, gemm_seconds = curve.points[-1]
        least_bytes, latency = self.all_reduces.points[0]
        most_bytes, seconds = self.all_reduces.points[-1]
        contention = min(1.0, self.contention * most_bytes / seconds)
        return (
            f"GEMM {2e-9 * m * k * n / gemm_seconds:.4g} GFLOP/s at {m} rows, "
            f"all-reduce {1e6 * latency:.4g} us at {least_bytes:.0f} bytes "
            f"and {1e-9 * most_bytes / seconds:.4g} GB/s at {most_bytes:.0f}, "
            f"of whose time {contention:.0%} is taken from concurrent GEMMs"
        )
