"""A calibration survives its file, and a wrong one is refused."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from schedules import quiet, seconds, timings

from tpkernels.overlap.calibration_cache import Calibration
from tpkernels.overlap.cost_model import Curve, GemmShape


@quiet
@given(
    st.dictionaries(
        st.sampled_from([torch.float32, torch.bfloat16]),
        st.tuples(seconds, seconds, st.floats(0, 1)),
        min_size=1,
    )
)
def test_table_round_trip(rates):
    measured = {GemmShape(2048, 3, 5, True): {1: 0.5, 4: 0.25}}
    dtypes = {
        d: dataclasses.replace(timings(*rate, measured), itemsize=d.itemsize)
        for d, rate in rates.items()
    }
    assert Calibration.from_json(Calibration("here", "today", dtypes).to_json()) == Calibration(
        "here", "today", dtypes
    )


def test_tables_with_wrong_numbers_are_refused():
    right = Calibration(
        "here", "today", {torch.float32: timings(measured={GemmShape(4, 1, 1, False): {1: 1.0}})}
    )
    change = {"itemsize": 4}
    for wrong in (
        dict(gemms={}),
        dict(all_reduces=Curve(())),
        dict(all_reduces=Curve(((2, 1.0), (1, 2.0)))),
        dict(chunked_all_reduces=Curve(((1, -1.0),))),
        dict(measured={GemmShape(4, 1, 1, False): {2: 1.0}}),
    ):
        text = Calibration(
            "here",
            "today",
            {torch.float32: dataclasses.replace(right.timings[torch.float32], **wrong, **change)},
        ).to_json()
        with pytest.raises(ValueError):
            Calibration.from_json(text)
