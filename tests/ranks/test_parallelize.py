"""Unmodified Hugging Face models, sharded by `tpk.parallelize`, equal the unsharded ones."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_grads, count_all_reduces
from pool import run_on_ranks
from user_models import llama_pair

import tpkernels as tpk


@pytest.mark.parametrize("ranks, dtensor", [(2, True), (3, False), (4, True), (4, False)])
@pytest.mark.parametrize("family", families.FAMILIES)
@run_on_ranks()
def test_equal_to_unsharded(family, dtensor):
    stock = families.make(family)
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=dtensor)
    ids, labels = families.batch()
    with torch.no_grad():
        want = stock(ids).logits
        assert (model(ids).logits - want).abs().max() < 1e-4 * want.abs().max()
    loss, want_loss = model(ids, labels=labels).loss, stock(ids, labels=labels).loss
    assert abs(loss - want_loss) < 1e-5 * want_loss
    with torch.no_grad():
        items = torch.tensor(37)
        scaled = model(ids, labels=labels, num_items_in_batch=items).loss
        assert (
            abs(scaled - stock(ids, labels=labels, num_items_in_batch=items).loss) < 1e-5 * scaled
        )
    loss.backward()
    want_loss.backward()
    assert_same_grads(stock, model)
    norm = tpk.clip_grad_norm_(model.parameters(), 0.5)
    want_norm = torch.nn.utils.clip_grad_norm_(stock.parameters(), 0.5)
    assert abs(norm - want_norm) < 1e-5 * want_norm
    foreach = dict(foreach=True) if dtensor else {}
    for m in (model, stock):
        torch.optim.AdamW(m.parameters(), 1e-3, **foreach).step()
    with torch.no_grad():
        after, want = model(ids, labels=labels).loss, stock(ids, labels=labels).loss
    assert abs(after - want) < 2e-5 * want
    for cache in (None, "static"):
        options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        mask = torch.ones_like(ids[:, :9])
        mask[0, :3] = 0
        tokens = [
            m.generate(ids[:, :9], attention_mask=mask, cache_implementation=cache, **options)
            for m in (model, stock)
        ]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("ranks, dtensor", [(2, True), (4, False)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@run_on_ranks()
def test_two_all_reduces_a_block_each_way(family, dtensor):
    check_collectives(family, dtensor)


@run_on_ranks(2)
def test_two_all_reduces_a_block_each_way_of_gpt2():
    """Run on fewer ranks than its KV heads divide among: it has 9."""
    check_collectives("gpt2", True)


def check_collectives(family, dtensor):
    stock = families.make(family)
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, dtensor=dtensor)
    ids, labels = families.batch()
    with tpk.log_collectives() as log:
        forward, output = count_all_reduces(lambda: model(ids, labels=labels))
    tags = [c.tag for c in log]
    blocks = model.config.num_hidden_layers
    assert tags.count("row_forward") == 2 * blocks and {c.chunks for c in log} == {1}
    assert forward == len(tags) == 2 * blocks + tags.count("embedding") + tags.count("loss")
    assert tags.count("loss") == 2 and tags.count("embedding") == 1
    with tpk.log_collectives() as log:
        backward, _ = count_all_reduces(output.loss.backward)
    tags = [c.tag for c in log]
    assert tags.count("column_backward") == 2 * blocks
    assert (
        backward
        == len(tags)
        == 2 * blocks + tags.count("head_backward") + tags.count("replicated_gradients")
    )
    assert tags.count("head_backward") == 1
    # q_norm and k_norm are replicated, and so are KV heads on more ranks than there are.
    replicated = family == "qwen3" or dist.get_world_size() > 3
    assert tags.count("replicated_gradients") == (blocks if replicated else 0)


# The heads go 2 + 1 groups on 2 ranks: a padded 2/3 of attention, a third of these parameters.
@pytest.mark.parametrize(
    "ranks, most", [(2, 0.5 * 1.05 + (2 / 3 - 1 / 2) * 0.35), (3, 1.05 / 3)], ids=["2", "3"]
)
@run_on_ranks()
def test_parameter_bytes_a_rank(most):
    stock = families.make("llama")
    unsharded = sum(p.nbytes for p in stock.parameters())
    model = tpk.parallelize(stock, dist.group.WORLD)
    assert sum(p.to_local().nbytes for p in model.parameters()) <= most * unsharded


@run_on_ranks(2)
def test_inference_mode_and_sampling():
    stock, model = llama_pair()
    ids, _ = families.batch()
    with torch.inference_mode():
        assert (model(ids).logits - stock(ids).logits).abs().max() < 1e-3
    model(ids, labels=ids).loss.backward()
    stock(ids, labels=ids).loss.backward()
    assert_same_grads(stock, model)
    torch.manual_seed(5)
    options = dict(max_new_tokens=12, do_sample=True, top_k=50, pad_token_id=0, eos_token_id=None)
    sampled = model.generate(ids[:, :6], **options)
    everyone = [torch.empty_like(sampled) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, sampled)
    assert all(torch.equal(sampled, other) for other in everyone)
    torch.manual_seed(5)
    assert torch.equal(sampled, stock.generate(ids[:, :6], **options))


@run_on_ranks(2)
def test_a_plan_can_be_extended():
    stock = families.make("llama")
    plan = {
        **tpk.auto_plan(stock),
        "model.layers.1.mlp.*": "replicate",
        "model.embed_tokens": "replicate",
    }
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD, plan)
    assert type(model.model.layers[0].mlp.up_proj) is tpk.nn.ColumnParallelLinear
    ids, labels = families.batch()
    model(ids, labels=labels).loss.backward()
    stock(ids, labels=labels).loss.backward()
    assert_same_grads(stock, model)


@pytest.mark.parametrize("name", ["LlamaModel", "GPT2Model", "LlamaForSequenceClassification"])
@run_on_ranks(2)
def test_base_models_and_classifiers(name):
    """Nothing to split behind the last block, and a loss of their own."""
    import transformers

    ids, _ = families.batch()
    options = dict(labels=torch.tensor([0, 1])) if "Classification" in name else {}
    config = families.make("gpt2" if "GPT2" in name else "llama").config
    torch.manual_seed(0)
    stock = getattr(transformers, name)(config).eval()
    model = tpk.parallelize(copy.deepcopy(stock), dist.group.WORLD)
    assert any(isinstance(m, tpk.nn.ColumnParallelLinear) for m in model.modules())
    with torch.no_grad():
        for mine, want in zip(model(ids, **options)[:2], stock(ids, **options)[:2], strict=True):
            if torch.is_tensor(mine):  # not the KV cache, which is split
                assert (mine - want).abs().max() < 1e-5
