"""The output layer and the loss of a sharded language model."""

import copy

import families
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_same_grads
from pool import run_on_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from user_models import llama_pair

import tpkernels as tpk


@run_on_ranks(2)
def test_loss_parallel_logits():
    stock, model = llama_pair()
    ids, labels = families.batch()
    want = stock(ids, labels=labels)
    output = model(ids, labels=labels)
    # Logits are sharded over their last dimension.
    assert isinstance(output.logits, DTensor) and output.logits.placements == (Shard(2),)
    assert (output.logits.full_tensor() - want.logits).abs().max() < 1e-3
    loss, logits, *_ = model(ids, labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and isinstance(logits, DTensor)
    assert type(model(ids).logits) is torch.Tensor
    whole = tpk.parallelize(families.make("llama"), dist.group.WORLD, loss_parallel=False)
    output = whole(ids, labels=labels)
    assert type(output.logits) is torch.Tensor and abs(output.loss - want.loss) < 1e-4
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
    assert abs(model(ids, labels=labels, shift_labels=shifted).loss - want.loss) < 1e-4
    try:
        model(ids, labels=labels.clamp_min(-1) + 400)
    except IndexError as error:
        assert "331 classes" in str(error)
    assert model.lm_head.gather_output  # also after an error
    assert type(model(ids).logits) is torch.Tensor
    model.loss_function = None


class OwnLossHead(nn.Module):
    def __init__(self, stock):
        super().__init__()
        self.model, self.config = stock, stock.config
        self.get_output_embeddings, self.get_input_embeddings = (
            stock.get_output_embeddings,
            stock.get_input_embeddings,
        )

    def forward(self, ids, labels=None):
        logits = self.model(ids).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@run_on_ranks(2)
def test_a_head_with_its_own_loss_gets_whole_logits():
    stock = families.make("llama")
    ids, _ = families.batch()
    model = OwnLossHead(copy.deepcopy(stock))
    plan = {f"model.{pattern}": style for pattern, style in stock._tp_plan.items()}
    tpk.parallelize(model, dist.group.WORLD, plan)
    assert abs(model(ids, labels=ids) - OwnLossHead(stock)(ids, labels=ids)) < 1e-4


@run_on_ranks(4)
def test_a_rank_without_any_of_the_vocabulary():
    stock, model = llama_pair(vocab_size=5, pad_token_id=None)  # 2 + 2 + 1 + 0 on 4 ranks
    ids = torch.randint(0, 5, (2, 7), generator=torch.Generator().manual_seed(0))
    loss, want = model(ids, labels=ids).loss, stock(ids, labels=ids).loss
    assert abs(loss - want) < 1e-5 * want
    loss.backward()
    want.backward()
    assert_same_grads(stock, model)
    with torch.no_grad():
        assert (model(ids).logits - stock(ids).logits).abs().max() < 1e-4
