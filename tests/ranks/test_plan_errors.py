"""Plans that `tpk.parallelize` refuses, before it changes anything."""

import families
import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks
from torch import nn
from user_models import PLAN, Attention, Quantised

import tpkernels as tpk
from tpkernels.parallelization.styles import STYLES


@run_on_ranks(3)
def test_plan_errors():
    def refuses(plan, *words, model=None, **options):
        model = model if model is not None else families.make("llama")
        before = {n: p.shape for n, p in model.named_parameters()}
        with tpk.log_collectives() as log, pytest.raises(ValueError) as error:
            tpk.parallelize(model, dist.group.WORLD, plan, **options)
        assert all(word in str(error.value) for word in words), error.value
        # Nothing has changed.
        assert before == {n: p.shape for n, p in model.named_parameters()} and not log

    refuses(
        {"model.layers.*.self_attn.q": "colwise"},
        "matches no module",
        "model.layers.*.self_attn.q_proj",
    )
    refuses({"model.layers.*.mlp.up_proj": "columnwise"}, "columnwise", *STYLES)
    refuses({"model.norm": "colwise"}, "LlamaRMSNorm", "nn.Linear")
    refuses({"model.layers.*.mlp.up_proj": "embedding_rowwise"}, "nn.Embedding")
    sparse = nn.Sequential(nn.Linear(8, 6), nn.Embedding(9, 8, sparse=True))
    refuses({"0": "colwise", "1": "embedding_rowwise"}, "sparse=True", model=sparse)
    refuses({"0": "colwise"}, "Quantised", model=nn.Sequential(Quantised(8, 6)))
    refuses("guess", "'guess'")
    refuses("auto", "overlap", overlap=True)
    refuses(
        {"0": "colwise", "1": "rowwise"},
        "cannot be sharded alike",
        model=nn.Sequential(nn.Linear(8, 6), nn.Linear(8, 8)),
    )
    refuses(
        {"model.embed_tokens": "embedding_rowwise", "lm_head": "replicate"},
        "tied",
        model=families.make("llama", tie_word_embeddings=True),
    )
    refuses("auto", "carries no tensor-parallel plan", model=nn.Sequential(nn.Linear(2, 2)))
    attention = {k: v for k, v in PLAN.items() if k != "extra"}
    refuses(attention, "extra", "replicated_with_grad_allreduce", model=Attention())
    model = Attention()
    model.sink = nn.Parameter(torch.zeros(9))
    refuses(PLAN, "sink", model=model)
    refuses({**PLAN, "wk": "packed_qkv_colwise"}, "wk", "whole heads", model=Attention())
    sharded = tpk.parallelize(families.make("llama"), dist.group.WORLD)
    refuses("auto", "already", model=sharded)
    if dist.get_world_size() > 2:
        small = families.make("llama", num_attention_heads=2, num_key_value_heads=1)
        refuses("auto", "2 attention heads", f"{dist.get_world_size()} ranks", model=small)
