"""The cost model: what a GEMM and its all-reduce take in some number of row chunks, from measured curves."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .. import _C

CHUNKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # what is considered
MIN_ROWS = 128  # of a chunk: below, GEMMs lose more than a shorter last all-reduce gains
PREDICTED_GAIN = 0.05  # what more than one chunk must be predicted to save of one chunk's time; the model errs by about as much
MEASURED_GAIN = 0.02  # the same where both were measured


class Shape(NamedTuple):
    """A layer's call: the GEMM [rows, inner] x [inner, features], whose result is all-reduced. With `weight_grad` (the backward of a
    column-parallel layer) the weight's gradient [inner, rows] x [rows, features] follows, under which the last chunks can hide.

    `inner` is the largest rank's share, so that ranks with uneven shares decide alike.
    """

    rows: int
    inner: int
    features: int
    weight_grad: bool


@dataclass(frozen=True)
class Curve:
    """Seconds by size, linear between measured points; before the first constant, beyond the last proportional to the size."""

    points: tuple[tuple[float, float], ...]

    @staticmethod
    def never_less_efficient(points: Iterable[tuple[float, float]]) -> Curve:
        """Of measured GEMMs: noise must not make cutting one look like a gain, so more rows never take longer each than fewer."""
        smoothed, each = [], math.inf
        for size, seconds in sorted(points):
            each = min(each, seconds / size)
            smoothed.append((size, size * each))
        return Curve(tuple(smoothed))

    def __call__(self, size: float) -> float:
        i = bisect_left(self.points, (size, 0.0))
        if i == 0:
            return self.points[0][1]
        before, seconds = self.points[i - 1]
        if i == len(self.points):
            return seconds * size / before
        after, more = self.points[i]
        return seconds + (more - seconds) * (size - before) / (after - before)


def pipeline(
    sizes: Sequence[int], gemm: Callable, message: Callable, steal: Callable, trailing: float = 0.0
) -> float:
    """Seconds of GEMMs of `sizes` rows one after the other, each followed by its all-reduce, all-reduces one after the other too.

    gemm, message: a chunk's seconds by its rows; steal: by how much its all-reduce delays what is computed beside it; trailing:
    seconds of work that follows the last GEMM.

        | GEMM 0 | GEMM 1 | GEMM 2 | trailing |
                 | message 0 | message 1 | message 2 |
    """
    compute = link = 0.0
    for i, rows in enumerate(sizes):
        compute += gemm(rows)
        link = max(compute, link) + message(rows)
        if i + 1 < len(sizes) or trailing:
            compute += steal(rows)
    return max(compute + trailing, link)


def chunk_rows(rows: int, chunks: int, row_bytes: int) -> list[int]:
    """Rows of each chunk, as the ops cut them."""
    bounds = _C.chunk_bounds(rows, chunks, row_bytes)
    return [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]


@dataclass(frozen=True)
class Timings:
    """What was measured in one dtype.

    Attributes:
        itemsize: of the dtype.
        gemms: (inner, features) -> seconds by rows.
        messages: seconds of an all-reduce by bytes; `chunked_messages`: the same through the group's communicator for chunks.
        steal: seconds that computation takes longer for each byte all-reduced beside it.
        measured: shape -> number of chunks -> seconds of the layer's op itself.
    """

    itemsize: int
    gemms: dict[tuple[int, int], Curve]
    messages: Curve
    chunked_messages: Curve
    steal: float
    measured: dict[Shape, dict[int, float]] = field(default_factory=dict)

    def gemm(self, rows: int, inner: int, features: int) -> float:
        """From the nearest measured sizes, in proportion."""

        def distance(sizes):
            return abs(math.log(sizes[0] / inner)) + abs(math.log(sizes[1] / features))

        nearest = min(self.gemms, key=distance)
        return self.gemms[nearest](rows) * (inner * features) / math.prod(nearest)

    def predict(self, shape: Shape) -> dict[int, float]:
        """Number of chunks -> seconds, for those that leave every chunk MIN_ROWS rows."""
        row_bytes = shape.features * self.itemsize
        trailing = self.gemm(shape.rows, shape.inner, shape.features) if shape.weight_grad else 0.0
        return {
            chunks: pipeline(
                chunk_rows(shape.rows, chunks, row_bytes),
                lambda rows: self.gemm(rows, shape.inner, shape.features),
                lambda rows, link=self.messages if chunks == 1 else self.chunked_messages: link(
                    rows * row_bytes
                ),
                lambda rows: self.steal * rows * row_bytes,
                trailing,
            )
            for chunks in CHUNKS
            if chunks == 1 or shape.rows >= chunks * MIN_ROWS
        }

    def decide(self, shape: Shape) -> tuple[int, str]:
        """The number of chunks, and why. What was measured counts, where anything was; otherwise what is predicted."""
        measured = self.measured.get(shape)
        times, least, word = (
            (measured, MEASURED_GAIN, "measured")
            if measured
            else (self.predict(shape), PREDICTED_GAIN, "predicted")
        )
        if len(times) == 1:
            return 1, f"{shape.rows} rows are fewer than two chunks of {MIN_ROWS}"
        best = min(times, key=times.get)
        gain = 1 - times[best] / times[1]
        if best == 1:
            return 1, f"one chunk is the fastest, {word}"
        if gain < least:
            return (
                1,
                f"{best} chunks would save {gain:.1%}, {word}, less than the {least:.0%} that is asked for",
            )
        return best, f"{best} chunks save {gain:.1%} of one chunk's time, {word}"

    @property
    def summary(self) -> str:
        (inner, features), curve = next(iter(self.gemms.items()))
        rows, seconds = curve.points[-1]
        size, message = self.messages.points[-1]
        return (
            f"GEMM {2e-9 * rows * inner * features / seconds:.4g} GFLOP/s at {rows} rows, all-reduce {1e6 * self.messages.points[0][1]:.4g} us at "
            f"{self.messages.points[0][0]:.0f} bytes and {1e-9 * size / message:.4g} GB/s at {size:.0f}, "
            f"of whose time {min(1.0, self.steal * size / message):.0%} is taken from GEMMs beside it"
        )
