"""Names, ties and the unsharded state of a sharded model."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
from helpers import assert_same_grads
from pool import run_on_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.testing import assert_close
from user_models import llama_pair

import tpkernels as tpk


def representation(dtensor):
    stock, model = llama_pair(dtensor, tie_word_embeddings=True)
    names = {n: tuple(p.shape) for n, p in stock.named_parameters()}
    assert list(names) == [n for n, _ in model.named_parameters()]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(isinstance(p, DTensor) == dtensor for p in model.parameters())
    if dtensor:
        parameters = dict(model.named_parameters())
        assert parameters["model.norm.weight"].placements == (Replicate(),)
        assert parameters["model.layers.0.mlp.up_proj.weight"].shape == (150, 72)
        rows = {2: 2 * 48, 3: 72, 4: 4 * 24}[
            dist.get_world_size()
        ]  # of 8: 6 + 3 heads padded to 6 + 6, 3 + 3 + 3, 3 + 2 + 2 + 2 padded
        assert parameters["model.layers.0.self_attn.q_proj.weight"].shape == (rows, 72)
    # The round trip is exact, and what another TP size wrote can be read.
    state = tpk.unsharded_state_dict(model)
    want = stock.state_dict()
    assert list(state) == list(want) and all(torch.equal(state[k], want[k]) for k in want)
    other = families.make("llama", tie_word_embeddings=True)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    tpk.parallelize(other, dist.group.WORLD, dtensor=not dtensor)
    tpk.load_unsharded_state_dict(other, state)
    again = tpk.unsharded_state_dict(other, rank0_only=True, cpu_offload=True)
    assert (dist.get_rank() == 0) == bool(again)
    assert all(torch.equal(again[k], want[k]) for k in again)
    broken = {**state, "extra": torch.zeros(1)}
    del broken["model.norm.weight"]
    with pytest.raises(KeyError, match=r"model\.norm\.weight.*extra"):
        tpk.load_unsharded_state_dict(other, broken)
    tpk.load_unsharded_state_dict(other, broken, strict=False)
    with pytest.raises(ValueError, match="unsharded model's"):
        tpk.load_unsharded_state_dict(other, {**state, "model.norm.weight": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="unsharded_state_dict"):
        model.save_pretrained("anywhere")
    return state


@pytest.mark.parametrize("dtensor", [True, False])
def test_names_ties_and_state(pool, dtensor):
    states = [pool.run(ranks, representation, dtensor)[0] for ranks in (2, 3, 4)]
    assert all(torch.equal(states[0][k], other[k]) for other in states[1:] for k in other)


@run_on_ranks(1)
def test_one_rank_keeps_plain_parameters():
    stock, model = llama_pair()
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    ids, labels = families.batch()
    with tpk.log_collectives() as log:
        model(ids, labels=labels).loss.backward()
    stock(ids, labels=labels).loss.backward()
    assert not log
    assert_same_grads(stock, model, 1e-6)
    state = tpk.unsharded_state_dict(model)
    assert all(torch.equal(state[k], v) for k, v in stock.state_dict().items())
    tpk.load_unsharded_state_dict(model, state)


class Buffered(nn.Module):
    """A module with a buffer, a layer that is sharded and one that is not."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)
        self.register_buffer("seen", torch.arange(3.0))


@torch.no_grad()
def add_one(tensors):
    for tensor in tensors:
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)


@pytest.mark.parametrize("dtensor", [True, False])
@pytest.mark.parametrize("offload", [True, False])
@run_on_ranks(1, 2)
def test_a_state_and_its_model_share_no_memory(offload, dtensor):
    torch.manual_seed(0)
    stock = Buffered()
    model = copy.deepcopy(stock)
    plan = {"up": "colwise", "down": "rowwise", "norm": "replicate"}
    tpk.parallelize(model, dist.group.WORLD, plan, dtensor=dtensor)
    want = {name: t.clone() for name, t in stock.state_dict().items()}
    state = tpk.unsharded_state_dict(model, cpu_offload=offload)
    add_one([*model.parameters(), *model.buffers()])
    assert_close(state, want, atol=0, rtol=0)
    # Loading puts everything back, the buffer too, and copies.
    tpk.load_unsharded_state_dict(model, state)
    add_one(state.values())
    assert_close(dict(tpk.unsharded_state_dict(model)), want, atol=0, rtol=0)
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name]
    gathered = tpk.unsharded_gradients(model)
    kept = {name: grad.clone() for name, grad in gathered.items()}
    add_one(grads.values())
    assert_close(gathered, kept, atol=0, rtol=0)
