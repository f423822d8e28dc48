"""The public all-reduce, of every dtype and layout."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import tpkernels as tpk
from tpkernels.ops import collectives


class Watched(TorchDispatchMode):
    """A mode that sees every op and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = function
        return function(*args, **(kwargs or {}))


def watched(tensor, group):
    with Watched() as mode:
        tpk.all_reduce_(tensor, group)
    assert mode.seen is torch.ops.tpkernels.all_reduce_.default


def op(tensor, group):
    torch.ops.tpkernels.all_reduce_(tensor, group.group_name, "sum", "x")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.int8,
    ],
    ids=str,
)
@run_on_ranks(3)
def test_all_reduce(dtype):
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    total = sum(range(1, world + 1))
    base = torch.arange(24).view(4, 6)
    for view in (
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[:, 1::2],
        lambda t: t[2],
        lambda t: t[0, 0],
    ):
        whole = (base.to(dtype) * 0 + 1) * (rank + 1)
        tensor = view(whole)
        with tpk.log_collectives() as log:
            assert tpk.all_reduce_(tensor, group) is tensor
        assert [(c.op, c.tag, c.bytes, c.chunk, c.chunks) for c in log] == [
            ("all_reduce", "all_reduce", tensor.nbytes, 0, 1)
        ]
        want = torch.full((4, 6), rank + 1, dtype=dtype)
        view(want).fill_(total)
        assert_close(whole, want, atol=0, rtol=0)  # in place, and nothing else


@run_on_ranks(3)
def test_a_tensor_that_requires_grad_is_refused():
    group = dist.group.WORLD
    leaf = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"requires grad.*detach"):
        tpk.all_reduce_(leaf, group)
    with torch.no_grad():
        tpk.all_reduce_(leaf, group)
    assert leaf.tolist() == [3, 3, 3]


@pytest.mark.parametrize("reduce", [tpk.all_reduce_, op, watched], ids=lambda f: f.__name__)
@pytest.mark.parametrize("view", ["whole", "columns"])
@run_on_ranks(2)
def test_autograd_refuses_a_saved_tensor_that_was_summed(view, reduce):
    factor, x = torch.ones(3, 4), torch.ones(3, 4, requires_grad=True)
    part = factor if view == "whole" else factor[:, 1::2]
    product = x * factor
    version = factor._version
    reduce(part, dist.group.WORLD)
    assert part.eq(2).all() and factor._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@run_on_ranks(3)
def test_an_empty_tensor_is_not_sent():
    with tpk.log_collectives() as log:
        tpk.all_reduce_(torch.empty(0, 3), dist.group.WORLD)
    assert not log


@run_on_ranks(2)
def test_a_plain_tensor_goes_past_the_dispatcher():
    """A small all-reduce is mostly dispatch."""
    with mock.patch.object(collectives, "_C") as c:
        tpk.all_reduce_(torch.ones(3), dist.group.WORLD)
    c.all_reduce_.assert_called_once()
