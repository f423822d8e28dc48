"""Fixtures of the tests of one process."""

import pytest
import torch
from cpu_ops import OPS, Eager


@pytest.fixture(params=[OPS, Eager()], ids=["kernel", "eager"])
def ops(request):
    """Return the fused ops by their CPU kernels, and as a device without kernels runs them."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
