"""Checks of indices on a GPU are assertions on the device: nothing waits for their values."""

from types import SimpleNamespace

import pytest
import torch

from tpkernels.ops.checks import check_in_range


class OnGpu:
    """A tensor of the host that says it is on a GPU, and refuses to tell its values."""

    def __init__(self, *values):
        self.values = torch.tensor(values, dtype=torch.int64)
        self.dtype, self.numel = self.values.dtype, self.values.numel
        self.device = SimpleNamespace(type="cuda")

    def __ge__(self, bound):
        return self.values >= bound

    def __lt__(self, bound):
        return self.values < bound


@pytest.mark.parametrize(
    ("values", "is_inside"), [((0, 4), True), ((2,), True), ((-1, 2), False), ((3, 5), False)]
)
def test_on_a_gpu(monkeypatch, values, is_inside):
    asserted = []
    stand_in = SimpleNamespace(msg=lambda holds, message: asserted.append((bool(holds), message)))
    monkeypatch.setattr(torch.ops.aten, "_assert_async", stand_in)
    check_in_range("ids", OnGpu(*values), 5, "a vocabulary of 5")
    assert asserted == [(is_inside, "ids outside [0, 5), a vocabulary of 5")]
    check_in_range("ids", OnGpu(), 5, "a vocabulary of 5")
    assert len(asserted) == 1


@pytest.mark.parametrize("values", [(-1, 2), (3, 5)])
def test_on_a_cpu(values):
    check_in_range("ids", torch.tensor([0, 4]), 5, "a vocabulary of 5")
    message = rf"ids has values from {values[0]} to {values[1]}, but a vocabulary of 5 takes 0 to 4"
    with pytest.raises(IndexError, match=message):
        check_in_range("ids", torch.tensor(values), 5, "a vocabulary of 5")
