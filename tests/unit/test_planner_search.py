"""The planner's search: what it ranks, and the sentences about it."""

import pytest
from planner_cases import GPUS

import tpkernels as tpk
from tpkernels_planner import Layout, advice, load_model, make_job, predict, search
from tpkernels_planner.hardware import load_hardware


def test_search_ranks_what_fits():
    job = make_job(load_model("llama-70b"), "h100", 2048)
    plan = search(job, 512, 2048)
    assert len(plan.rows) > 50
    for row in plan.rows:
        assert row.fits and row.layout.gpus == 512 and row.layout.global_batch == 2048
        row.layout.check(job.model, job.seq)
    assert [row.step_s for row in plan.rows] == sorted(row.step_s for row in plan.rows)
    assert not any(row.fits for row in plan.too_large)
    again = predict(job, plan.best.layout)
    assert again.step_s == plan.best.step_s and again.memory == plan.best.memory
    assert len({row.layout for row in plan.rows}) == len(plan.rows)
    flat = search(job, 512, 2048, most_pp=1)
    assert {row.layout for row in flat.rows} == {
        row.layout for row in plan.rows if row.layout.pp == 1
    }


def test_search_of_16384_gpus():
    plan = search(make_job(load_model("llama3-405b"), "h100", 8192), 16384, 2048)
    assert plan.best.layout.gpus == 16384
    # 126 blocks over 16 stages of 4 chunks: 64 chunks of at most 2, so the fullest stage has 8.
    assert Layout(8, 16, 128, 1, 2048, 4).blocks(plan.job.model) == 8
    assert plan.first(lambda layout: layout.pp == 16 and layout.interleave == 4)


def test_the_reasons_are_the_rows_own():
    hybrid = tpk.plan("gpt3-175b", gpus=512, global_batch=256)
    words = " ".join(advice(hybrid))
    assert "512 GPUs = 8-way TP x 64-way DP: a step of at least 256 sequences" in words
    assert (
        "FSDP alone (ZeRO-3, TP 1) does not fit or does not divide the batch" in words
        and "TP 1 fits nowhere" in words
    )
    assert "does not run sequence parallelism" in words
    small = tpk.plan("llama-7b", gpus=8, global_batch=64)
    words = " ".join(advice(small))
    best = {tp: small.first(lambda layout, tp=tp: layout.tp == tp).step_s for tp in (1, 2, 4, 8)}
    assert min(best, key=best.get) == small.tp == 1
    for tp, seconds in best.items():
        assert f"TP {tp} {seconds / best[1]:.2f}x" in words
    assert "TP stops paying after 1" in words and "Memory binds" not in words
    fsdp = small.first(lambda layout: layout.tp == 1 and layout.zero == 3)
    assert f"FSDP alone takes {fsdp.step_s:.3g} s" in words
    slow = tpk.plan("llama-7b", gpus=16, global_batch=64, network_gbit=5)
    assert "(the network)" in " ".join(advice(slow))
    pipeline = tpk.plan("llama-70b", gpus=512, batch_tokens="4M", max_pp=None)
    words = " ".join(advice(pipeline))
    assert (
        pipeline.pp > 1
        and "tpkernels has no pipeline of its own" in words
        and "Memory binds" in words
    )


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_plan(name):
    gpu = load_hardware(name)
    assert gpu.sources and gpu.title
    plan = tpk.plan("smollm2-135m", gpus=2 * gpu.gpus_per_node, gpu=name, global_batch=64, seq=1024)
    assert 0.005 < plan.best.mfu < 1
