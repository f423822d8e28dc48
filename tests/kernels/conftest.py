"""The Triton kernels: on the GPU where there is one, else by triton's interpreter (tests/test_kernels.py starts pytest so)."""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        """The interpreter's conversion to bfloat16 truncates: this rounds to the nearest, ties to even, as the hardware."""
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(data, np.float32).view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << 16  # the same, faster
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def pytest_itemcollected(item):
    if not INTERPRETED:
        item.add_marker("gpu")


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def dtype(request):
    return request.param
