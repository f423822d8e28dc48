"""The output layer and the loss of a sharded language model."""

import copy

import families
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_same_grads
from pool import run_on_ranks
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.testing import assert_close
from transformers.loss import loss_utils
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


class Labelled(nn.Module):
    """A head as transformers' models have it, which hands the caller's options to its loss."""

    def __init__(self, loss_function):
        super().__init__()
        self.body, self.head = nn.Embedding(13, 6), nn.Linear(6, 13)
        self.loss_function = loss_function
        self.get_output_embeddings = lambda: self.head

    def forward(self, ids, labels=None, **options):
        logits = self.head(self.body(ids))
        if labels is None:
            return logits
        return self.loss_function(logits, labels, vocab_size=13, **options), logits


@pytest.mark.parametrize("loss", ["ForCausalLMLoss", "ForMaskedLMLoss"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(ignore_index=5),
        dict(num_items_in_batch=11),
        dict(num_items_in_batch=torch.tensor(11), ignore_index=5),
    ],
    ids=str,
)
@run_on_ranks(2)
def test_losses_of_transformers_and_their_options(options, loss):
    torch.manual_seed(0)
    stock = Labelled(getattr(loss_utils, loss))
    model = copy.deepcopy(stock)
    model.get_output_embeddings = lambda: model.head
    tpk.parallelize(model, dist.group.WORLD, {"head": "colwise_gather_output"})
    ids = torch.randint(13, (3, 9))
    labels = torch.randint(13, (3, 9)).index_fill(1, torch.tensor([2, 8]), 5)
    labels[:, 4] = options.get("ignore_index", -100)
    with tpk.log_collectives() as log:
        mine, logits = model(ids, labels=labels, **options)
    assert isinstance(logits, DTensor) and {c.tag for c in log} == {"loss"}
    want, _ = stock(ids, labels=labels, **options)
    assert_close(mine, want)
    mine.backward()
    want.backward()
    assert_same_grads(stock, model)
    # A loss of full logits is the stock one's.
    full = model(ids)
    assert_close(model.loss_function(full, labels, vocab_size=13, **options), want)


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
