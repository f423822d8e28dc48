"""The planner's models: sizes, parameters and FLOPs against those of real modules."""

import families
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tpkernels as tpk
from tpkernels_planner.model_config import from_config, load_model

transformers = pytest.importorskip("transformers", reason="the families' modules need transformers")


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


PUBLISHED_BILLIONS = """
llama-7b 6.74         llama-13b 13.02       llama-70b 68.98       llama3-8b 8.03
llama3-405b 405.85    gpt3-175b 174.6       gpt2 0.1244           gpt2-xl 1.5576
mistral-7b 7.24       qwen2.5-7b 7.62       qwen2.5-72b 72.71     qwen3-8b 8.19
gpt-neox-20b 20.55    opt-66b 65.7
"""


def test_named_models_have_their_published_sizes():
    words = PUBLISHED_BILLIONS.split()
    for name, billions in zip(words[::2], map(float, words[1::2]), strict=True):
        assert load_model(name).parameters / 1e9 == pytest.approx(billions, rel=2e-3), name


def test_python_and_configurations():
    config = transformers.LlamaConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024
    )
    by_object = tpk.plan(config, gpus=8, batch_tokens="64k")
    by_dict = tpk.plan(config.to_dict(), gpus=8, global_batch=32)
    assert by_object.rows == by_dict.rows and by_object.best.layout.pp == 1
