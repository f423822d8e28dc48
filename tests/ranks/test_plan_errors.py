"""Plans that `tpk.parallelize` refuses, before it changes anything."""

from functools import partial

import families
import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks
from torch import nn
from user_models import PLAN, Attention, Quantised

import tpkernels as tpk
from tpkernels.parallelization.styles import STYLES

LLAMA = partial(families.make, "llama")
NO_EXTRA = {k: v for k, v in PLAN.items() if k != "extra"}


def with_a_sink():
    model = Attention()
    model.sink = nn.Parameter(torch.zeros(9))
    return model


# Each has a function that makes the model, the plan, and words of the message.
REFUSED = {
    "no such module": (
        LLAMA,
        {"model.layers.*.self_attn.q": "colwise"},
        ["matches no module", "model.layers.*.self_attn.q_proj"],
    ),
    "no such style": (
        LLAMA,
        {"model.layers.*.mlp.up_proj": "columnwise"},
        ["columnwise", *STYLES],
    ),
    "a norm by columns": (LLAMA, {"model.norm": "colwise"}, ["LlamaRMSNorm", "nn.Linear"]),
    "a linear layer as an embedding": (
        LLAMA,
        {"model.layers.*.mlp.up_proj": "embedding_rowwise"},
        ["nn.Embedding"],
    ),
    "sparse gradients": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Embedding(9, 8, sparse=True)),
        {"0": "colwise", "1": "embedding_rowwise"},
        ["sparse=True"],
    ),
    "a quantised layer": (
        lambda: nn.Sequential(Quantised(8, 6)),
        {"0": "colwise"},
        ["Quantised"],
    ),
    "another word than auto": (LLAMA, "guess", ["'guess'"]),
    "layers of unequal widths": (
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 8)),
        {"0": "colwise", "1": "rowwise"},
        ["cannot be sharded alike"],
    ),
    "one of two tied": (
        partial(LLAMA, tie_word_embeddings=True),
        {"model.embed_tokens": "embedding_rowwise", "lm_head": "replicate"},
        ["tied"],
    ),
    "a model without a plan": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        "auto",
        ["carries no tensor-parallel plan"],
    ),
    "a layer that is not named": (
        Attention,
        NO_EXTRA,
        ["extra", "replicated_with_grad_allreduce"],
    ),
    "a parameter of its own": (with_a_sink, PLAN, ["sink"]),
    "heads cut into pieces": (
        Attention,
        {**PLAN, "wk": "packed_qkv_colwise"},
        ["wk", "whole heads"],
    ),
    "fewer heads than ranks": (
        partial(LLAMA, num_attention_heads=2, num_key_value_heads=1),
        "auto",
        ["2 attention heads", "3 ranks"],
    ),
}


def assert_refused(model, plan, words, **options):
    before = {n: p.shape for n, p in model.named_parameters()}
    with tpk.log_collectives() as log, pytest.raises(ValueError) as error:
        tpk.parallelize(model, dist.group.WORLD, plan, **options)
    assert all(word in str(error.value) for word in words), error.value
    # Nothing has changed.
    assert before == {n: p.shape for n, p in model.named_parameters()} and not log


@pytest.mark.parametrize("name", REFUSED)
@run_on_ranks(3)
def test_plans(name):
    make, plan, words = REFUSED[name]
    assert_refused(make(), plan, words)


@run_on_ranks(3)
def test_overlap():
    assert_refused(LLAMA(), "auto", ["overlap"], overlap=True)


@run_on_ranks(3)
def test_a_model_twice():
    sharded = tpk.parallelize(LLAMA(), dist.group.WORLD)
    assert_refused(sharded, "auto", ["already"])
