"""tpk.parallelize on unmodified Hugging Face models against the unsplit model."""

import copy

import families
import pytest
import torch
import torch.distributed as dist

import tpkernels as tpk


def unsplit_grads(model):
    """Gradients of a split model in the stock layout: its state dict with each parameter's gradient in its place."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for mine, parameter in zip(twin.parameters(), model.parameters(), strict=True):
            if parameter.grad is None:
                mine.zero_()
            else:
                mine.copy_(parameter.grad)
    return tpk.unsharded_state_dict(twin)


def assert_same_grads(stock, split, tolerance=2e-5):
    grads = unsplit_grads(split)
    for name, parameter in stock.named_parameters():
        want = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        error = (grads[name] - want).abs().max() / want.abs().max().clamp_min(1e-6)
        assert error < tolerance, f"{name}: {error:.1e}"


def equal_to_unsplit(family, dtensor):
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
        assert abs(scaled - stock(ids, labels=labels, num_items_in_batch=items).loss) < 1e-5 * scaled
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
        tokens = [m.generate(ids[:, :9], attention_mask=mask, cache_implementation=cache, **options) for m in (model, stock)]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_equal_to_unsplit(pool, family, ranks):
    pool.run(ranks, equal_to_unsplit, family, ranks != 3)
