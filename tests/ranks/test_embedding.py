"""The vocabulary-parallel embedding against nn.Embedding, exactly."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import EXACT
from pool import run_on_ranks
from refusal import assert_refused
from torch import nn
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import VocabParallelEmbedding
from tpkernels.sharding.spec import ShardSpec, chunk_sizes


def some_ids(vocabulary):
    """Return ids of all ranks: repeated, 0-d, 1-d, 3-d, none at all, not contiguous, int32."""
    rng = torch.Generator().manual_seed(vocabulary)
    ids = torch.randint(vocabulary, (4, 6), generator=rng)
    every = torch.arange(vocabulary).repeat(2)
    return [
        ids,
        ids.t(),
        every[::3],
        every.int(),
        ids[0, 0],
        ids.view(2, 3, 4).transpose(0, 2),
        ids[:0],
        torch.full((7,), vocabulary - 1),
    ]


def integers(*shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape).to(dtype)


def check_function(vocabulary, padding_idx, dtype):
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    spec, table = ShardSpec.chunks(vocabulary, world), integers(vocabulary, 6, dtype=dtype)
    for ids in some_ids(vocabulary):
        stock = table.clone().requires_grad_()
        mine = spec.shard(table, rank).clone().requires_grad_()
        want = F.embedding(ids, stock, padding_idx)
        with tpk.log_collectives() as log:
            out = tpf.vocab_parallel_embedding(
                ids, mine, group=group, num_embeddings=vocabulary, padding_idx=padding_idx
            )
        assert_close(out, want, **EXACT)
        assert [(c.op, c.tag, c.bytes) for c in log] == [
            ("all_reduce", "embedding", out.nbytes)
        ] * (world > 1 and out.nbytes > 0)
        dy = integers(*out.shape, dtype=dtype)
        for grad in (
            dy,
            torch.ones((), dtype=dtype).expand(out.shape),
        ):  # contiguous, and as sum() makes it
            stock.grad = mine.grad = None
            with tpk.log_collectives() as log:
                out.backward(grad, retain_graph=True)
            assert not log
            want.backward(grad, retain_graph=True)
            assert_close(mine.grad, spec.shard(stock.grad, rank), **EXACT)


@pytest.mark.parametrize("vocabulary", [331, 5])
@pytest.mark.parametrize(
    "padding_idx, dtype", [(None, torch.float32), (3, torch.float32), (0, torch.bfloat16)]
)
@run_on_ranks(1, 2, 3, 4)
def test_equals_nn_embedding_exactly(padding_idx, dtype, vocabulary):
    check_function(vocabulary, padding_idx, dtype)


def check_module(make, stock):
    """A split table against the stock one: weights, output, gradients, state dict."""
    sharded = make()
    assert (
        sharded.weight.shape[0]
        == chunk_sizes(stock.num_embeddings, dist.get_world_size())[dist.get_rank()]
    )
    assert_close(dict(tpk.unsharded_state_dict(sharded)), dict(stock.state_dict()), **EXACT)
    with torch.no_grad():
        stock.weight.copy_(integers(*stock.weight.shape))
    tpk.load_unsharded_state_dict(sharded, stock.state_dict())
    ids = torch.arange(stock.num_embeddings).repeat(2).view(2, -1)
    want, out = stock(ids), sharded(ids)
    assert_close(out, want, **EXACT)
    dy = integers(*out.shape)
    out.backward(dy)
    want.backward(dy)
    assert_close(tpk.unsharded_gradients(sharded)["weight"], stock.weight.grad, **EXACT)


@pytest.mark.parametrize("vocabulary", [331, 5])
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
@run_on_ranks(1, 2, 3, 4)
def test_module_is_nn_embedding_for_a_seed_and_from_one(padding_idx, vocabulary):
    group = dist.group.WORLD
    torch.manual_seed(3)
    stock = nn.Embedding(vocabulary, 6, padding_idx)
    torch.manual_seed(3)
    check_module(
        lambda v=vocabulary, p=padding_idx: VocabParallelEmbedding(v, 6, p, group=group),
        stock,
    )
    stock = nn.Embedding(vocabulary, 6, padding_idx)
    check_module(
        lambda stock=stock: VocabParallelEmbedding.from_embedding(stock, group=group), stock
    )


@run_on_ranks(2)
def test_from_embedding_leaves_its_source():
    stock = nn.Embedding(331, 6)
    stock.weight.requires_grad_(False)
    stock.eval()
    before = stock.weight.clone()
    sharded = VocabParallelEmbedding.from_embedding(stock, group=dist.group.WORLD)
    assert not sharded.weight.requires_grad and not sharded.training
    with torch.no_grad():
        sharded.weight.zero_()
    assert torch.equal(stock.weight, before)
    # The shard does not keep the whole table alive.
    assert sharded.weight.untyped_storage().nbytes() == sharded.weight.nbytes


@run_on_ranks(1, 3)
def test_refused_on_every_rank_before_communication():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    shard, options = (
        torch.zeros(chunk_sizes(331, world)[rank], 6),
        dict(group=group, num_embeddings=331),
    )

    def look_up(*ids, weight=shard):
        return lambda: tpf.vocab_parallel_embedding(torch.tensor(*ids), weight, **options)

    assert_refused(look_up([0, 331]), IndexError, "ids", "0 to 331", "0 to 330")
    assert_refused(look_up([[5, -1]]), IndexError, "ids", "-1 to 5", "0 to 330")
    assert_refused(look_up([1.0]), TypeError, "ids", "torch.float32")
    assert_refused(look_up([True]), TypeError, "ids", "torch.bool")
    assert_refused(
        look_up([1], weight=torch.zeros(7, 6)), ValueError, "weight has 7 rows", "num_embeddings"
    )
    assert_refused(
        lambda: VocabParallelEmbedding(331, 6, group=group)(torch.tensor([400])),
        IndexError,
        "ids",
        "400",
        "330",
    )
    assert_refused(
        lambda: VocabParallelEmbedding(331, 6, 331, group=group),
        ValueError,
        "padding_idx=331",
        "331",
    )
    assert_refused(
        lambda: VocabParallelEmbedding.from_embedding(nn.Linear(2, 2), group=group),
        TypeError,
        "nn.Embedding",
        "Linear",
    )
    assert_refused(
        lambda: VocabParallelEmbedding.from_embedding(
            nn.Embedding(9, 2, max_norm=1.0), group=group
        ),
        ValueError,
        "max_norm=1.0",
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
@run_on_ranks(4)
def test_integers_that_nn_embedding_does_not_take(dtype):
    """The last of 4 ranks has none of the 5 rows, and refuses the ids as the others do."""
    layer = VocabParallelEmbedding(5, 6, group=dist.group.WORLD)
    ids = torch.tensor([1, 4], dtype=dtype)
    assert_refused(lambda: layer(ids), TypeError, "ids", str(dtype))


@run_on_ranks(2)
def test_negative_padding_idx_counts_from_the_end():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    mine = torch.zeros(chunk_sizes(331, world)[rank], 6, requires_grad=True)
    tpf.vocab_parallel_embedding(
        torch.tensor([330, 330]), mine, group=group, num_embeddings=331, padding_idx=-1
    ).sum().backward()
    assert not mine.grad.any()
