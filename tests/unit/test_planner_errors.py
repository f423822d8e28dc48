"""Input that the planner refuses, and input that it parses."""

import json

import pytest

import tpkernels as tpk
from tpkernels_planner import Layout, Model, PlanError, load_model, make_job, predict
from tpkernels_planner.hardware import load_hardware
from tpkernels_planner.job import amount, sequences
from tpkernels_planner.layout import parse_layout
from tpkernels_planner.model import DATA
from tpkernels_planner.model_config import from_config

SMALL = dict(gpus=8, global_batch=8)
GPT2 = dict(model_type="gpt2", n_embd=0, n_layer=1, n_head=1, vocab_size=5, n_positions=3)
# Each row: a function, its arguments, its options, and a pattern of the error.
REFUSED_MODELS = [
    (load_model, ["lama-70b"], {}, "near it: .*llama-70b"),
    (load_hardware, ["h1000"], {}, "near it: .*h100"),
    (load_model, ["nowhere/config.json"], {}, "cannot be read"),
    (from_config, [dict(model_type="llama", hidden_size=8)], {}, "no key 'num_hidden_layers'"),
    (from_config, [dict(hidden_size=8)], {}, "no key 'model_type'"),
    (from_config, [dict(model_type="mixtral")], {}, "no model family.*near it: .*mistral"),
    (from_config, [GPT2], {}, "n_embd must be"),
    (Model, [100, 2, 3, 10], {}, "hidden=100 is not a multiple of heads=3"),
    (Model, [96, 2, 8, 10], dict(kv_heads=3), "kv_heads=3 must divide heads=8"),
    (Model, [96, -2, 8, 10], {}, "layers must be a whole number of at least 1, got -2"),
    (Model, [96, 2, 8, 10.5], {}, "vocab must be"),
    (tpk.plan, [3], SMALL, "model must be"),
    (
        tpk.plan,
        ["llama-70b"],
        dict(gpus=7, global_batch=64),
        "7 GPUs cannot share 64 sequences|no layout",
    ),
    (
        tpk.plan,
        ["llama-70b"],
        dict(gpus=2, global_batch=64),
        r"no layout of 2 h100 fits.*GB more than.*\d+ GPUs would do",
    ),
    (parse_layout, ["tp=two", 8, 8], {}, "no whole number"),
    (parse_layout, ["tq=2", 8, 8], {}, "near it: tp"),
    (parse_layout, ["tp=3", 8, 8], {}, "not a multiple of tp"),
    (parse_layout, ["tp=2,dp=2", 8, 8], {}, "one of 4 GPUs, not of 8"),
]
# Each row: options of a plan of llama-7b, and a pattern of the error.
REFUSED_OPTIONS = [
    (dict(gpus=0, global_batch=8), "gpus must be"),
    (dict(gpus=8), "pass one of batch_tokens"),
    (dict(gpus=8, global_batch=8, batch_tokens=8), "pass one of batch_tokens"),
    (dict(gpus=8, batch_tokens=100), "batch_tokens=100 is less than a sequence"),
    (dict(gpus=8, batch_tokens="many"), "no number"),
    (dict(gpus=8, batch_tokens="-4M"), "at least 1"),
    (dict(SMALL, seq=0), "seq must be"),
    (dict(SMALL, max_pp=0), "max_pp must be a whole number of at least 1, got 0"),
    (dict(SMALL, dtype="int3"), "no int3 arithmetic; it has bfloat16"),
    (dict(SMALL, software="megatron"), "near it: megatron-2021"),
    (dict(SMALL, network_gbit=-1), "network_gbit must be positive"),
]
# Each row: a layout of a model of 2 blocks and 8 heads, and a pattern of the error.
REFUSED_LAYOUTS = [
    (Layout(tp=16, global_batch=1), "tp=16 is more than the model's 8 heads"),
    (Layout(pp=4, global_batch=1), "more than the model's 2 blocks"),
    (Layout(dp=3, global_batch=4), "not a multiple of dp"),
    (Layout(zero=4), "zero=4 is none of"),
    (Layout(recompute="some"), "recompute='some' is none of"),
    (Layout(interleave=2), "needs a pipeline"),
]


@pytest.mark.parametrize(
    "function, args, options, message", REFUSED_MODELS, ids=[row[-1][:30] for row in REFUSED_MODELS]
)
def test_models_and_texts_are_refused(function, args, options, message):
    with pytest.raises(PlanError, match=message):
        function(*args, **options)


@pytest.mark.parametrize(
    "options, message", REFUSED_OPTIONS, ids=[message[:30] for _, message in REFUSED_OPTIONS]
)
def test_options_are_refused(options, message):
    with pytest.raises(PlanError, match=message):
        tpk.plan("llama-7b", **options)


@pytest.mark.parametrize(
    "layout, message", REFUSED_LAYOUTS, ids=[message[:30] for _, message in REFUSED_LAYOUTS]
)
def test_layouts_are_refused(layout, message):
    with pytest.raises(PlanError, match=message):
        predict(make_job(Model(96, 2, 8, 10), "h100", 8), layout)


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
