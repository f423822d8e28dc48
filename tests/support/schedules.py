"""Timings made up for tests of the schedule, and strategies of hypothesis."""

from hypothesis import settings
from hypothesis import strategies as st

from tpkernels.overlap.cost_model import Curve, Timings

quiet = settings(deadline=None, database=None, derandomize=True)


seconds = st.floats(1e-6, 1e3)


def timings(row=1e-3, byte=1e-6, contention=0.0, measured=None, latency=0.0):
    """Return float32 timings: GEMMs of `row` seconds a row, all-reduces of latency + bytes."""
    gemm = Curve(((1, row), (1000, 1000 * row)))
    link = Curve(((1, latency + byte), (10**9, latency + 10**9 * byte)))
    return Timings(4, {(1, 1): gemm}, link, link, contention, measured or {})
