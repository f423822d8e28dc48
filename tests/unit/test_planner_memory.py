"""The planner's memory against papers' formulas."""

import math

from tpkernels_planner import Job, Layout, Model, load_model, make_job
from tpkernels_planner.hardware import load_hardware
from tpkernels_planner.memory import block_activations, local_parameters, memory


def test_the_seed_figure_70b_over_4_ranks():
    model = load_model("llama-70b")
    held = memory(make_job(model, "h100", 2048), Layout(tp=4, global_batch=1))
    assert 17e9 < held.parameters / 2 < 18e9
    assert held.parameters == 2 * local_parameters(model, Layout(tp=4))


def test_activations_of_megatron_are_the_papers():
    """Korthikanti et al., arXiv 2205.05198, table 2, per block."""
    model = Model(512, 4, 8, 1000)
    s = 256
    b = 2
    t = 4
    job = Job(model, load_hardware("a100-80"), s, "float16", "megatron-2021")
    sbh = s * b * 512
    scores = 5 * 8 * s * s * b
    wanted = {
        (1, False, "none"): 34 * sbh + scores,
        (t, False, "none"): sbh * (10 + 24 / t) + scores / t,
        (t, True, "none"): 34 * sbh / t + scores / t,
        (t, False, "selective"): sbh * (10 + 24 / t),
        (t, True, "selective"): 34 * sbh / t,
        (t, False, "full"): 2 * sbh,
    }
    for (tp, sp, recompute), value in wanted.items():
        layout = Layout(
            tp, micro_batch=b, global_batch=b, sequence_parallel=sp, recompute=recompute
        )
        assert block_activations(job, layout) == value, (tp, sp, recompute)


def test_zero_shares_out_what_it_says():
    job = make_job(load_model("llama-7b"), "h100", 2048)
    plain, one, two, three = (
        memory(job, Layout(dp=8, global_batch=8, zero=zero)) for zero in range(4)
    )
    for name, since in (("optimizer", 1), ("gradients", 2), ("parameters", 3)):
        for zero, held in ((1, one), (2, two), (3, three)):
            whole = getattr(plain, name)
            assert getattr(held, name) == (math.ceil(whole / 8) if zero >= since else whole)
    assert three.workspace > plain.workspace  # what is gathered
