"""The cost model of overlapped chunks against pipelines worked out by hand, and its decisions."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from schedules import quiet, seconds, timings

from tpkernels.overlap.cost_model import (
    CHUNK_COUNTS,
    MIN_ROWS,
    Curve,
    GemmShape,
    chunk_rows,
    pipeline_seconds,
)


def test_pipelines_by_hand():
    cost = {
        "gemm": lambda rows: 3 * rows,
        "all_reduce": lambda rows: 2 * rows,
        "contention": lambda rows: 0,
    }
    assert pipeline_seconds([10], **cost) == 30 + 20
    # The GEMM is the longer one: the last all-reduce is left over.
    assert pipeline_seconds([5, 5], **cost) == 30 + 10
    assert pipeline_seconds([6, 4], **cost) == 30 + 8  # less of it, with a smaller last chunk
    slow = {**cost, "all_reduce": lambda rows: 5 * rows}
    # The link is the longer one: the first GEMM is left over.
    assert pipeline_seconds([5, 5], **slow) == 15 + 50
    assert pipeline_seconds([2, 8], **slow) == 6 + max(10, 24) + 40
    # The longer of the two follows.
    assert (
        pipeline_seconds([10], **cost, trailing=15) == 50
        and pipeline_seconds([10], **cost, trailing=25) == 55
    )
    busy = {**cost, "contention": lambda rows: rows}
    assert pipeline_seconds([10], **busy) == 50  # nothing runs beside the only all-reduce
    assert pipeline_seconds([5, 5], **busy) == 30 + 5 + 10
    assert pipeline_seconds([5, 5], **busy, trailing=25) == 30 + 10 + 25


@quiet
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    seconds,
    seconds,
    st.floats(0, 10),
    st.floats(0, 1e4),
)
def test_pipeline_bounds(sizes, gemm, message, contention, trailing):
    """No faster than either resource alone, no slower than one after the other."""
    total = pipeline_seconds(
        sizes, lambda r: r * gemm, lambda r: r * message, lambda r: r * contention, trailing
    )
    rows, near = sum(sizes), 1 + 1e-9
    assert total * near >= max(rows * gemm + trailing, sizes[0] * gemm + rows * message)
    assert total <= near * (rows * (gemm + message + contention) + trailing)


@quiet
@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), seconds),
        min_size=1,
        max_size=8,
        unique_by=lambda point: point[0],
    ),
    st.integers(1, 10**7),
)
def test_curves(points, size):
    curve = Curve(tuple(sorted(points)))
    assert all(curve(at) == pytest.approx(value) for at, value in curve.points)
    ends = [value for at, value in curve.points]
    assert size > curve.points[-1][0] or min(ends) <= curve(size) * (1 + 1e-9) <= max(ends) * (
        1 + 2e-9
    )
    smooth = Curve.never_less_efficient(points)
    each = [value / at for at, value in smooth.points]
    assert all(a >= b * (1 - 1e-12) for a, b in zip(each, each[1:], strict=False))
    # Noise is taken away, never added.
    assert all(smooth(at) <= value * (1 + 1e-9) for at, value in points)
    # A long and a short time side by side do not cost the short one its digits.
    assert Curve(((1, 17.0), (2, 1e-6)))(2) == 1e-6
    assert (
        Curve(((1, 2.0), (3, 4.0)))(2) == 3
        and Curve(((1, 2.0), (3, 4.0)))(6) == 8
        and Curve(((2, 1.0),))(1) == 1
    )


def test_candidates_leave_every_chunk_enough_rows():
    for rows in (1, 255, 256, 500, 4096):
        found = timings().predict(GemmShape(rows, 1, 1, False))
        assert list(found) == [n for n in CHUNK_COUNTS if n == 1 or rows >= n * MIN_ROWS]
        assert all(min(chunk_rows(rows, n, 4)[:-1], default=MIN_ROWS) >= MIN_ROWS for n in found)


def test_predictions_are_the_pipeline_over_the_ops_own_chunks():
    shape, cost = GemmShape(2048, 3, 5, True), timings(contention=1e-8, byte=1e-7)
    gemm, byte = 15e-3, 4 * 5 * 1e-7
    want = pipeline_seconds(
        [128, 384, 512, 512, 384, 128],
        lambda r: r * gemm,
        lambda r: r * byte,
        lambda r: r * 4 * 5 * 1e-8,
        2048 * gemm,
    )
    assert cost.predict(shape)[6] == pytest.approx(want)
    nearest = dataclasses.replace(cost, gemms={**cost.gemms, (3, 6): Curve(((1, 18e-6),))})
    assert nearest.gemm(10, 3, 5) == pytest.approx(10 * 15e-6) and nearest.gemm(
        10, 1, 1
    ) == pytest.approx(10e-3)


def test_margins():
    shape = GemmShape(2048, 1, 1, False)
    assert timings(byte=0.2e-3).decide(shape)[0] > 1
    chunks, why = timings(byte=0.01e-3).decide(shape)  # at most 4% to gain
    assert chunks == 1 and "predicted, less than the 5%" in why
    # All of the traffic uses the cores that the GEMM needs.
    assert timings(byte=0.2e-3, contention=0.2e-3).decide(shape)[0] == 1
    assert timings(byte=0.2e-3).decide(GemmShape(255, 1, 1, False)) == (
        1,
        "255 rows are fewer than two chunks of 128",
    )
    for second, chunks in (
        (0.99, 1),
        (0.97, 2),
        (1.5, 1),
    ):  # the measurement counts, whatever is predicted
        for byte in (0.01e-3, 0.2e-3):
            got, why = timings(byte=byte, measured={shape: {1: 1.0, 2: second, 4: 2.0}}).decide(
                shape
            )
            assert got == chunks and "measured" in why


@quiet
@given(st.integers(1, 20000), seconds, seconds, st.floats(0, 1e-3), st.booleans())
def test_never_predicted_slower_than_one_chunk(rows, row, byte, contention, weight_grad):
    cost, shape = timings(row, byte, contention), GemmShape(rows, 1, 1, weight_grad)
    predicted, (chunks, _) = cost.predict(shape), cost.decide(shape)
    assert predicted[chunks] <= predicted[1]
