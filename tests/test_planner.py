"""The planner: sizes against real modules, memory against traced bytes, time against measured steps, and what it refuses."""

import csv
import functools
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, replace

import doc_blocks
import families
import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import tpkernels as tpk
from tools.planner import fit, validate
from tpkernels_planner import Layout, Model, PlanError, advice, predict, search
from tpkernels_planner.hardware import bus_share, load_hardware
from tpkernels_planner.jobs import amount, make_job, parse_layout, sequences, sized_model
from tpkernels_planner.layout import Job
from tpkernels_planner.memory import block_activations, local_parameters, memory
from tpkernels_planner.model import DATA, from_config, load_model
from tpkernels_planner.time import Constants, constants_of, step_time

transformers = pytest.importorskip("transformers", reason="the families' modules need transformers")
GPUS = ("a100-40", "a100-80", "h100", "h200", "b200", "l40s", "v100", "cpu")


def stock(name, **changes):
    kind, options = families.FAMILIES[name]
    options = {**options, **changes}
    options.pop("attn_implementation", None)
    config = getattr(transformers, families.CONFIG.get(kind, f"{kind}Config"))(**options)
    config._attn_implementation = "eager"  # its products are plain ones, which torch counts
    return getattr(transformers, families.MODEL.get(kind, f"{kind}ForCausalLM"))(
        config
    ).eval(), config


VARIANTS = [(name, {}) for name in families.FAMILIES] + [
    ("llama", dict(mlp_bias=True, attention_bias=True)),
    ("llama", dict(head_dim=24)),
    ("qwen2", dict(tie_word_embeddings=True)),
    ("qwen3", dict(attention_bias=True)),
    ("gemma2", dict(tie_word_embeddings=False)),
    ("gemma3", dict(attention_bias=True)),
    ("olmo2", dict(attention_bias=True)),
    ("gpt2", dict(n_inner=100)),
    ("gpt2", dict(tie_word_embeddings=False)),
    ("gpt_neox", dict(attention_bias=False, tie_word_embeddings=True)),
    ("stablelm", dict(use_qkv_bias=True)),
    ("stablelm", dict(qk_layernorm=True)),
    ("stablelm", dict(use_parallel_residual=True)),
    ("opt", dict(enable_bias=False)),
    ("opt", dict(do_layer_norm_before=False)),
    ("opt", dict(layer_norm_elementwise_affine=False)),
    ("opt", dict(word_embed_proj_dim=100)),
]


@pytest.mark.parametrize(
    "name, changes", VARIANTS, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "stock"
)
def test_parameters_and_flops_are_the_modules_own(name, changes):
    module, config = stock(name, **changes)
    model = from_config(config.to_dict(), name)
    assert model.parameters == sum(p.numel() for p in module.parameters())
    if "word_embed_proj_dim" in changes:
        return  # its projections in and out are no part of a block
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(torch.zeros(1, 64, dtype=torch.long), use_cache=False)
    counts = counter.get_flop_counts()
    rotary = sum(
        sum(ops.values())
        for path, ops in counts.items()
        if path.endswith(("rotary_emb", "rotary_emb_local"))
    )
    assert model.forward_flops(64) == counter.get_total_flops() - rotary


def test_named_models_have_their_published_sizes():
    published = {
        "llama-7b": 6.74,
        "llama-13b": 13.02,
        "llama-70b": 68.98,
        "llama3-8b": 8.03,
        "llama3-405b": 405.85,
        "gpt3-175b": 174.6,
        "gpt2": 0.1244,
        "gpt2-xl": 1.5576,
        "mistral-7b": 7.24,
        "qwen2.5-7b": 7.62,
        "qwen2.5-72b": 72.71,
        "qwen3-8b": 8.19,
        "gpt-neox-20b": 20.55,
        "opt-66b": 65.7,
    }
    for name, billions in published.items():
        assert load_model(name).parameters / 1e9 == pytest.approx(billions, rel=2e-3), name


def test_the_seed_figure_70b_over_4_ranks():
    model = load_model("llama-70b")
    held = memory(make_job(model, "h100", 2048), Layout(tp=4, global_batch=1))
    assert 17e9 < held.parameters / 2 < 18e9
    assert held.parameters == 2 * local_parameters(model, Layout(tp=4))


# ---- memory ------------------------------------------------------------------------------------------------------------------


def saved_bytes(forward, parameters):
    """Bytes of the storages that a forward keeps for its backward pass, the parameters' own left out, and the fused loss' gradient of the
    table, which becomes the parameter's."""
    parameters = list(parameters)
    own, table = {p.untyped_storage().data_ptr() for p in parameters}, parameters[0].shape
    seen = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own and t.shape != table:
            seen[storage.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward()
    return sum(t.untyped_storage().nbytes() for t in seen.values()), out


class Whole(torch.nn.Module):
    def __init__(self, model: Model, dtype):
        super().__init__()
        norm, options = (
            ("rmsnorm" if model.gated else "layernorm"),
            dict(group=dist.group.WORLD, dtype=dtype),
        )
        self.embedding = tpk.nn.VocabParallelEmbedding(model.vocab, model.hidden, **options)
        self.blocks = torch.nn.ModuleList(
            tpk.nn.ParallelTransformerBlock(
                model.hidden,
                model.heads,
                model.ffn,
                model.kv_heads,
                activation="swiglu" if model.gated else "gelu",
                norm=norm,
                bias=not model.gated,
                **options,
            )
            for _ in range(model.layers)
        )
        self.norm = (tpk.nn.RMSNorm if model.gated else tpk.nn.LayerNorm)(model.hidden, dtype=dtype)
        self.model = model

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        weight = self.embedding.weight
        return tpk.functional.vocab_parallel_linear_cross_entropy(
            self.norm(x), weight, ids, group=dist.group.WORLD, num_classes=self.model.vocab
        )


def traced(gated, kv_heads, dtype):
    """(predicted, real) of what a rank holds, in bytes."""
    model = replace(sized_model(64, 3, 8, 500, kv_heads, 256, gated, 32), tied=True, positions=0)
    module = Whole(model, dtype)
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    job = Job(model, load_hardware("cpu"), 32, name, "tpkernels")
    layout = Layout(tp=dist.get_world_size(), micro_batch=4, global_batch=4)
    predicted = memory(job, layout)
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    ids = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    activations, loss = saved_bytes(lambda: module(ids), module.parameters())
    loss.backward()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in module.parameters())
    adam = torch.optim.AdamW(module.parameters())
    adam.step()
    state = sum(
        t.numel() * t.element_size() for s in adam.state.values() for t in s.values() if t.dim()
    )
    return asdict(predicted), dict(
        parameters=parameters, gradients=gradients, optimizer=state, activations=activations
    )


@pytest.mark.parametrize("gated, kv_heads", [(False, None), (True, 4)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_is_what_a_run_holds(pool, ranks, gated, kv_heads):
    for predicted, real in pool.run(ranks, traced, gated, kv_heads, torch.float32):
        for part in ("parameters", "gradients", "optimizer"):
            assert predicted[part] == real[part], part
        assert predicted["activations"] == pytest.approx(real["activations"], rel=0.03)
        assert sum(predicted.values()) == pytest.approx(sum(real.values()), rel=0.1)
    predicted, real = pool.run(ranks, traced, gated, kv_heads, torch.bfloat16)[0]
    assert predicted["parameters"] == real["parameters"]
    assert predicted["activations"] == pytest.approx(real["activations"], rel=0.03)


def recomputed():
    """(predicted, real) activations where blocks are recomputed: their inputs, and one block's own while it is."""
    model = replace(sized_model(64, 3, 8, 500, None, 256, False, 32), tied=True, positions=0)
    job = Job(model, load_hardware("cpu"), 32, "float32", "tpkernels")
    layout = Layout(tp=dist.get_world_size(), micro_batch=4, global_batch=4)
    module = Whole(model, torch.float32)
    x = torch.randn(4, 32, 64, requires_grad=True)
    inside, _ = saved_bytes(lambda: module.blocks[0](x), module.parameters())
    for block in module.blocks:
        block.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
        )
    ids = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(0))
    kept, _ = saved_bytes(lambda: module(ids), module.parameters())
    return memory(job, replace(layout, recompute="full")).activations, kept + inside


@pytest.mark.parametrize("ranks", [1, 2])
def test_memory_of_recomputation(pool, ranks):
    for predicted, real in pool.run(ranks, recomputed):
        assert predicted == pytest.approx(real, rel=0.05)


def test_activations_of_megatron_are_the_papers():
    """Korthikanti et al., arXiv 2205.05198, table 2, per block."""
    model, s, b, t = Model(512, 4, 8, 1000), 256, 2, 4
    job = Job(model, load_hardware("a100-80"), s, "float16", "megatron-2021")
    sbh, scores = s * b * 512, 5 * 8 * s * s * b
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


# ---- time --------------------------------------------------------------------------------------------------------------------


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
    # A pipeline's bubble is (p - 1) / m of the step where the stages are alike, 1/v of that interleaved (arXiv 2104.04473, 2.2).
    blocks = replace(job.model, layers=64, vocab=8)
    for interleave in (1, 4):
        deep = Layout(pp=8, global_batch=64, interleave=interleave)
        time = step_time(replace(job, model=blocks), deep, replace(c, send=1e-12))
        assert time.bubble / (time.compute + time.tp_exposed) == pytest.approx(
            7 / 64 / interleave, rel=0.1
        )


def test_measured_steps_are_predicted():
    single, known = fit.single_node(), fit.published()
    assert len(single) == 1440 and len(known) == 14
    held = [abs(fit.error(row)) for row in single if row.held]
    assert 240 < len(held) < 336
    assert statistics.mean(held) <= 0.07
    assert statistics.mean(abs(fit.error(row)) for row in known) <= 0.10


def test_the_published_choice_of_tp_pp_dp_is_first_or_near():
    for row in fit.published():
        published, first = fit.best_published(row)
        assert published.step_s <= 1.03 * first.step_s, published.layout.words()


def test_the_planner_chooses_as_was_measured():
    losses = [loss for _, loss in validate.choices(fit.groups())]
    assert len(losses) == 144 and statistics.mean(losses) < 0.05


def test_the_fit_is_of_these_files():
    fitted = json.loads((DATA / "fitted.json").read_text())
    measured = {path.name: path for path in fit.measured_files()}
    assert measured.keys() == fitted["data"].keys()
    for name, digest in fitted["data"].items():
        assert hashlib.sha256(measured[name].read_bytes()).hexdigest() == digest, (
            f"run `{fitted['command']}`"
        )


def test_a_fit_finds_the_constants_that_made_its_rows():
    pytest.importorskip("scipy", reason="fitting needs scipy")
    gpu = load_hardware("a100-80")
    true = constants_of(gpu)
    rows = list(fit.single_node()[::40])
    made = [
        (replace(row, seconds=row.predict(replace(true, gemm=0.7, host=5e-4)).step_s), 1.0)
        for row in rows
    ]
    found = fit._solve(made, asdict(true), {name: fit.START[name] for name in ("gemm", "host")})
    assert found["gemm"] == pytest.approx(0.7, rel=1e-2) and found["host"] == pytest.approx(
        5e-4, rel=1e-2
    )
    assert Constants(**found) == replace(true, gemm=found["gemm"], host=found["host"])


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
    job = Job(load_model("llama-7b"), hardware, seq, hardware.half, software)
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


# ---- search ------------------------------------------------------------------------------------------------------------------


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
    # 126 blocks over 16 stages, 4 chunks each: 64 chunks of at most 2, so that the fullest stage has 8
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


def test_plan_is_a_layout_for_init_mesh(pool):
    for shape in pool.run(2, mesh_of_plan):
        assert shape == {"dp": 2, "tp": 1}


def mesh_of_plan():
    made = tpk.plan("smollm2-135m", gpus=2, gpu="cpu", global_batch=8, seq=256)
    assert (made.tp, made.pp, made.dp) == (1, 1, 2)
    mesh = tpk.init_mesh(made, device="cpu")
    deep = replace(made, rows=(replace(made.best, layout=Layout(pp=2, global_batch=8)),))
    with pytest.raises(ValueError, match="pp=2"):
        tpk.init_mesh(deep, device="cpu")
    return dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))


def test_python_and_configurations():
    config = transformers.LlamaConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024
    )
    by_object = tpk.plan(config, gpus=8, batch_tokens="64k")
    by_dict = tpk.plan(config.to_dict(), gpus=8, global_batch=32)
    assert by_object.rows == by_dict.rows and by_object.best.layout.pp == 1


# ---- bad input ---------------------------------------------------------------------------------------------------------------

SMALL = dict(gpus=8, global_batch=8)
REFUSED = [
    (lambda: load_model("lama-70b"), "near it: .*llama-70b"),
    (lambda: load_hardware("h1000"), "near it: .*h100"),
    (lambda: load_model("nowhere/config.json"), "cannot be read"),
    (lambda: from_config({"model_type": "llama", "hidden_size": 8}), "no key 'num_hidden_layers'"),
    (lambda: from_config({"hidden_size": 8}), "no key 'model_type'"),
    (lambda: from_config({"model_type": "mixtral"}), "no model family.*near it: .*mistral"),
    (
        lambda: from_config(
            {
                "model_type": "gpt2",
                "n_embd": 0,
                "n_layer": 1,
                "n_head": 1,
                "vocab_size": 5,
                "n_positions": 3,
            }
        ),
        "n_embd must be",
    ),
    (lambda: Model(100, 2, 3, 10), "hidden=100 is not a multiple of heads=3"),
    (lambda: Model(96, 2, 8, 10, kv_heads=3), "kv_heads=3 must divide heads=8"),
    (lambda: Model(96, -2, 8, 10), "layers must be a whole number of at least 1, got -2"),
    (lambda: Model(96, 2, 8, 10.5), "vocab must be"),
    (lambda: tpk.plan("llama-7b", gpus=0, global_batch=8), "gpus must be"),
    (lambda: tpk.plan("llama-7b", gpus=8), "pass one of batch_tokens"),
    (
        lambda: tpk.plan("llama-7b", gpus=8, global_batch=8, batch_tokens=8),
        "pass one of batch_tokens",
    ),
    (
        lambda: tpk.plan("llama-7b", gpus=8, batch_tokens=100),
        "batch_tokens=100 is less than a sequence",
    ),
    (lambda: tpk.plan("llama-7b", gpus=8, batch_tokens="many"), "no number"),
    (lambda: tpk.plan("llama-7b", gpus=8, batch_tokens="-4M"), "at least 1"),
    (lambda: tpk.plan("llama-7b", **SMALL, seq=0), "seq must be"),
    (
        lambda: tpk.plan("llama-7b", **SMALL, max_pp=0),
        "max_pp must be a whole number of at least 1, got 0",
    ),
    (lambda: tpk.plan("llama-7b", **SMALL, dtype="int3"), "no int3 arithmetic; it has bfloat16"),
    (lambda: tpk.plan("llama-7b", **SMALL, software="megatron"), "near it: megatron-2021"),
    (lambda: tpk.plan("llama-7b", **SMALL, network_gbit=-1), "network_gbit must be positive"),
    (lambda: tpk.plan(3, **SMALL), "model must be"),
    (
        lambda: tpk.plan("llama-70b", gpus=7, global_batch=64),
        "7 GPUs cannot share 64 sequences|no layout",
    ),
    (
        lambda: tpk.plan("llama-70b", gpus=2, global_batch=64),
        r"no layout of 2 h100 fits.*GB more than.*\d+ GPUs would do",
    ),
    (
        lambda: predict(make_job(Model(96, 2, 8, 10), "h100", 8), Layout(tp=16, global_batch=1)),
        "tp=16 is more than the model's 8 heads",
    ),
    (
        lambda: predict(make_job(Model(96, 2, 8, 10), "h100", 8), Layout(pp=4, global_batch=1)),
        "more than the model's 2 blocks",
    ),
    (
        lambda: predict(make_job(Model(96, 2, 8, 10), "h100", 8), Layout(dp=3, global_batch=4)),
        "not a multiple of dp",
    ),
    (
        lambda: predict(make_job(Model(96, 2, 8, 10), "h100", 8), Layout(zero=4)),
        "zero=4 is none of",
    ),
    (
        lambda: predict(make_job(Model(96, 2, 8, 10), "h100", 8), Layout(recompute="some")),
        "recompute='some' is none of",
    ),
    (
        lambda: predict(make_job(Model(96, 2, 8, 10), "h100", 8), Layout(interleave=2)),
        "needs a pipeline",
    ),
    (lambda: parse_layout("tp=two", 8, 8), "no whole number"),
    (lambda: parse_layout("tq=2", 8, 8), "near it: tp"),
    (lambda: parse_layout("tp=3", 8, 8), "not a multiple of tp"),
    (lambda: parse_layout("tp=2,dp=2", 8, 8), "one of 4 GPUs, not of 8"),
]


@pytest.mark.parametrize("call, words", REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_bad_input_is_refused(call, words):
    with pytest.raises(PlanError, match=words):
        call()


def test_amounts():
    assert (
        amount("4M", "n") == 4 * 2**20 and amount("512k", "n") == 512 * 1024 and amount(7, "n") == 7
    )
    assert sequences(2048, batch_tokens="4M") == 2048
    assert parse_layout("tp=4, sp, zero=1, micro-batch=2", 16, 8) == Layout(
        4, 1, 4, 2, 8, sequence_parallel=True, zero=1
    )


def test_a_gpus_own_file(tmp_path):
    data = json.loads((DATA / "hardware" / "h100.json").read_text())
    data["memory_bytes"] = 3 * data["memory_bytes"]
    (tmp_path / "big.json").write_text(json.dumps(data))
    assert load_hardware(str(tmp_path / "big.json")).memory_bytes == data["memory_bytes"]
    assert tpk.plan("llama-70b", gpus=8, global_batch=8, gpu=str(tmp_path / "big.json")).rows
    for change, words in (
        ({"memory_bytes": -1}, "memory_bytes must be a positive number"),
        ({"node": {}}, "no key"),
        ({"flops_per_s": 3}, "describe"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(PlanError, match=words):
            load_hardware(str(tmp_path / "bad.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PlanError, match="describe"):
        load_hardware(str(tmp_path / "bad.json"))


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_plan(name):
    gpu = load_hardware(name)
    assert gpu.sources and gpu.title
    plan = tpk.plan("smollm2-135m", gpus=2 * gpu.gpus_per_node, gpu=name, global_batch=64, seq=1024)
    assert 0.005 < plan.best.mfu < 1


# ---- the command -------------------------------------------------------------------------------------------------------------


def command(*args, **env):
    return subprocess.run(
        [sys.executable, "-c", "from tpkernels_command import main; main()", "plan", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "220", **env},
    )


PREDICT = [
    "predict",
    "--gpu",
    "a100-80",
    "--hidden",
    "12288",
    "--layers",
    "96",
    "--heads",
    "96",
    "--seq",
    "2048",
    "--vocab",
    "51200",
    "--tp",
    "8",
    "--pp",
    "8",
    "--dp",
    "8",
    "--global-batch",
    "512",
    "--micro-batch",
    "1",
    "--interleave",
    "1",
    "--recompute",
    "full",
    "--zero",
    "0",
]


def test_predict_as_other_scripts_call_it():
    run = command(*PREDICT, "--json", "-")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    model = sized_model(12288, 96, 96, 51200, seq=2048)
    assert result["memory_bytes"] == sum(result["memory_parts_bytes"].values())
    assert result["tflops_per_gpu"] == pytest.approx(
        512 * model.step_flops(2048) / result["step_s"] / 512 / 1e12
    )
    assert result["mfu"] == pytest.approx(result["tflops_per_gpu"] / 312)
    assert 1.25 < result["hardware_tflops_per_gpu"] / result["tflops_per_gpu"] < 1.34
    assert 90 < result["tflops_per_gpu"] < 140
    assert result["software"] == "megatron-2021"
    run = command(
        "predict",
        "--gpu",
        "h100",
        *PREDICT[3:-6],
        "--recompute",
        "none",
        "--sequence-parallel",
        "--zero",
        "1",
        "--json",
        "-",
    )
    other = json.loads(run.stdout)
    assert (
        other["software"] == "tpkernels"
        and other["layout"]["sequence_parallel"]
        and other["layout"]["zero"] == 1
    )


def test_commands(tmp_path):
    model = ["--model", "llama-70b", "--gpus", "512", "--gpu", "h100", "--batch-tokens", "4M"]
    run = command(*model, "--json", str(tmp_path / "plan.json"), "--top", "3")
    assert run.returncode == 0 and "Step time by TP size" in run.stdout and "DP 64" in run.stdout, (
        run.stderr
    )
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert len(saved["rows"]) == 3 and saved["advice"] and os.listdir(tmp_path) == ["plan.json"]
    run = command("compare", "tp=8,zero=1,sp", "tp=4,zero=3", *model)
    assert run.returncode == 0 and "TP 8, DP 64, SP, ZeRO-1" in run.stdout, run.stdout + run.stderr
    run = command("explain", "tp=8,zero=1,sp", *model)
    assert run.returncode == 0 and "arXiv 2104.04473" in run.stdout, run.stderr
    run = command("--sweep", "gpus", *model)
    assert run.returncode == 0 and "512 GPUs, tokens/s a GPU" in run.stdout, run.stderr
    run = command("explain", "--row", "2", *model)
    assert run.returncode == 0 and "MFU =" in run.stdout, run.stderr
    (tmp_path / "empty.md").write_text("no sections")
    for refused, words in (
        (
            ["--sweep", "gpus", "--model", "llama-7b", "--gpus", "0", "--global-batch", "8"],
            "gpus must be",
        ),
        (["validate", "--page", str(tmp_path / "empty.md")], "has no section <!-- errors -->"),
        (["validate", "--page", str(tmp_path / "none.md")], "No such file"),
    ):
        run = command(*refused)
        assert run.returncode == 1 and words in run.stderr and "Traceback" not in run.stderr, (
            run.stderr
        )
    run = command("--model", "lama", "--gpus", "8", "--global-batch", "8")
    assert run.returncode == 1 and "near it" in run.stderr and "Traceback" not in run.stderr


def test_planning_needs_no_torch():
    code = "import sys; sys.argv = ['', 'plan', 'layouts', '--help']\nfrom tpkernels_command import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "--batch-tokens" in run.stdout, run.stderr


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    model = ["--model", "llama-7b", "--gpus", "16", "--global-batch", "64"]
    for name, extra in (("rows.svg", []), ("sweep.png", ["--sweep", "gpus"])):
        run = command(*model, *extra, "--picture", str(tmp_path / name))
        assert run.returncode == 0 and (tmp_path / name).stat().st_size > 5000, run.stderr
    run = command(*model, "--picture", str(tmp_path / "rows.docx"))
    assert run.returncode == 1 and "end it in .svg" in run.stderr
    assert sorted(os.listdir(tmp_path)) == ["rows.svg", "sweep.png"]


def test_the_pages_commands_print_what_they_show():
    page = (DATA.parents[1] / "docs" / "when-to-use-tp.md").read_text()
    assert len(doc_blocks.BLOCK.findall(page)) >= 5
    assert doc_blocks.refreshed(page) == page, (
        "run `python tests/doc_blocks.py docs/when-to-use-tp.md`"
    )


def test_the_page_shows_what_the_planner_says():
    page = (DATA.parents[1] / "docs" / "planner.md").read_text()
    for line in [
        *validate.constants_lines(),
        *validate.published_lines(),
        *validate.choice_lines(fit.groups()),
    ]:
        assert line in page, "run `tpkernels plan validate --page docs/planner.md`"
