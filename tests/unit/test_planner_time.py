"""The planner's step times: the sum of their parts, and their change with hardware and layout."""

import csv
import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import GPUS

from tpkernels_planner import Job, Layout, load_model, make_job, predict
from tpkernels_planner.collectives import bus_share
from tpkernels_planner.constants import constants_of
from tpkernels_planner.hardware import load_hardware
from tpkernels_planner.memory import memory
from tpkernels_planner.model import DATA
from tpkernels_planner.step_time import step_time


def test_bus_bandwidth_is_the_measured_curve():
    with (DATA / "measured" / "allreduce_busbw.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["system"] == "8xH200 NVLink SHARP"]
    assert len(rows) == 7
    for row in rows:
        assert 482e9 * bus_share(float(row["message_MiB"]) * 2**20, 482e9) == pytest.approx(
            float(row["busbw_GBps"]) * 1e9
        )
    shares = [bus_share(2.0**i, 482e9) for i in range(40)]
    assert all(0 < a <= b <= 1 for a, b in zip(shares, shares[1:], strict=False))


def test_a_step_is_the_sum_of_its_parts_and_worsens_as_it_should():
    job = make_job(load_model("llama-7b"), "h100", 2048)
    layout = Layout(tp=4, pp=2, dp=4, micro_batch=1, global_batch=64)
    c = constants_of(job.hardware)
    time = step_time(job, layout, c)
    parts = asdict(time)
    assert time.total == pytest.approx(
        sum(value for name, value in parts.items() if "hidden" not in name)
    )
    assert all(value >= 0 for value in parts.values())
    slower = [
        (
            replace(
                job,
                hardware=replace(
                    job.hardware, link=replace(job.hardware.link, bus_bytes_per_s=50e9)
                ),
            ),
            layout,
        ),
        (replace(job, hardware=replace(job.hardware, memory_bytes_per_s=1e12)), layout),
        (replace(job, seq=4096), layout),
        (job, replace(layout, recompute="full")),
        (replace(job, software="megatron-2021"), layout),
        (job, replace(layout, global_batch=128)),
    ]
    for other, changed in slower:
        assert step_time(other, changed, c).total > time.total
    # A pipeline's bubble is (p - 1) / m of the step where the stages are alike, and 1 / v of that
    # interleaved (arXiv 2104.04473, 2.2).
    blocks = replace(job.model, layers=64, vocab=8)
    for interleave in (1, 4):
        deep = Layout(pp=8, global_batch=64, interleave=interleave)
        time = step_time(replace(job, model=blocks), deep, replace(c, send=1e-12))
        assert time.bubble / (time.compute + time.tp_exposed) == pytest.approx(
            7 / 64 / interleave, rel=0.1
        )


layouts = st.builds(
    Layout,
    tp=st.sampled_from([1, 2, 3, 4, 8]),
    pp=st.sampled_from([1, 2, 3, 4]),
    dp=st.sampled_from([1, 2, 5, 64]),
    micro_batch=st.sampled_from([1, 2, 4]),
    global_batch=st.just(64 * 5 * 4 * 4),
    recompute=st.sampled_from(["none", "selective", "full"]),
    sequence_parallel=st.booleans(),
    zero=st.integers(0, 3),
)


@given(
    layout=layouts,
    software=st.sampled_from(["tpkernels", "megatron-2021"]),
    gpu=st.sampled_from(GPUS),
    seq=st.sampled_from([1, 128, 2048]),
)
@settings(max_examples=100, deadline=None)
def test_predictions_make_sense(layout, software, gpu, seq):
    hardware = load_hardware(gpu)
    job = Job(load_model("llama-7b"), hardware, seq, hardware.training_dtype, software)
    row = predict(job, layout)
    assert all(
        0 <= value < math.inf
        for value in [*asdict(row.time).values(), *asdict(row.memory).values()]
    )
    assert row.step_s > 0 and 0 < row.mfu < 1 and row.flops_per_gpu <= row.hardware_flops_per_gpu
    for name, more in (("zero", layout.zero + 1), ("tp", 2 * layout.tp)):
        if more <= (3 if name == "zero" else 32):
            smaller = memory(job, replace(layout, **{name: more}))
            assert smaller.total - smaller.workspace <= row.memory.total - row.memory.workspace
