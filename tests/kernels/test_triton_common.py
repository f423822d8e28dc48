import importlib

import layouts
import pytest
import torch

from tpkernels.kernels import tuning
from tpkernels.kernels.common import SUM_BLOCKS, as_rows, sum_partials, sum_partials_kernel
from tpkernels.kernels.launch_config import Config, Tunable
from tpkernels.kernels.registration import OP_MODULES


def tunables_of(module):
    members = vars(importlib.import_module(f"tpkernels.kernels.{module}")).values()
    return [member.name for member in members if isinstance(member, Tunable)]


@pytest.mark.parametrize("num_splits", [1, 64, 130])
@pytest.mark.parametrize("count, cols", [(0, 5), (1, 1), (1, 70), (2, 33), (2, 0)])
def test_sum_partials(num_splits, count, cols, device):
    partial_sums = torch.randint(-8, 9, (num_splits, count, cols), device=device).float()
    out = sum_partials(partial_sums, torch.bfloat16)
    assert len(out) == count
    for mine, want in zip(out, partial_sums.sum(0).bfloat16(), strict=True):
        torch.testing.assert_close(mine, want, atol=0, rtol=0)


def test_partial_sums_that_lie_far_apart(device):
    """A program of the first columns, of more than 32 bits count altogether."""
    partial_sums = torch.arange(96.0, device=device).view(3, 32)
    (far,), out = layouts.far_apart(partial_sums), partial_sums.new_empty(32)
    sum_partials_kernel[(1,)](far, out, None, 3, layouts.FAR, **SUM_BLOCKS)
    torch.testing.assert_close(out, partial_sums.sum(0), atol=0, rtol=0)


@pytest.mark.parametrize(
    "tensor, shares",
    [
        (torch.randn(7), True),
        (torch.randn(2, 3, 4), True),
        (torch.randn(6, 8)[:, :4], True),
        (torch.randn(2, 3, 8)[..., :4], True),
        (torch.randn(4, 6)[:, ::6], True),
        (torch.randn(4, 6).t(), False),
        (torch.randn(3, 2, 4).transpose(0, 1), False),
        (torch.randn(2, 0, 4), None),
        (torch.randn(3, 0), None),
    ],
    ids=lambda value: (
        f"{tuple(value.shape)} {value.stride()}" if isinstance(value, torch.Tensor) else None
    ),
)
def test_as_rows(tensor, shares):
    rows = as_rows(tensor)
    assert rows.shape == (tensor.shape[:-1].numel(), tensor.shape[-1])
    assert rows.stride(-1) == 1 or tensor.shape[-1] == 1
    torch.testing.assert_close(rows.reshape(tensor.shape), tensor, atol=0, rtol=0)
    if shares is not None:
        assert (rows.data_ptr() == tensor.data_ptr()) == shares


def test_tunable_takes_the_choice_of_its_size(monkeypatch):
    monkeypatch.setattr(Tunable, "known", {})
    tunable = Tunable(
        "example",
        lambda features, itemsize: [Config(dict(BLOCK_N=features)), Config(dict(BLOCK_N=itemsize))],
        None,
    )
    assert Tunable.known == {"example": tunable}
    assert tunable(100, 2).blocks == dict(BLOCK_N=128)
    tunable.chosen[128, 2] = Config(dict(BLOCK_N=7))
    assert (
        tunable(65, 2).blocks == dict(BLOCK_N=7)
        and tunable(64, 2).blocks == dict(BLOCK_N=64)
        and tunable(100, 4).blocks == dict(BLOCK_N=128)
    )


def test_what_a_chip_has_no_room_for_is_not_chosen(monkeypatch, device):
    monkeypatch.setattr(Tunable, "known", {})
    tunable = Tunable(
        "example",
        lambda features, itemsize: [Config(dict(BLOCK_N=size)) for size in (256, 128, 64)],
        lambda *_: lambda: tunable(64, 2).blocks["BLOCK_N"],
    )
    error = type("OutOfResources", (Exception,), {})

    def measure(call):
        if call() == 256:
            raise error
        return call()

    arguments = tunable, 64, torch.float16, device, measure
    assert tuning._fastest(*arguments).blocks == dict(BLOCK_N=64)
    assert not tunable.chosen
    error = KeyError
    with pytest.raises(KeyError):
        tuning._fastest(*arguments)
    assert not tunable.chosen


@pytest.mark.parametrize("name", [name for module in OP_MODULES for name in tunables_of(module)])
def test_samples_to_tune_by_stay_within_their_tensors(name, device):
    Tunable.known[name].sample(2, torch.float32, device)()
