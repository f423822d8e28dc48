"""Tests of the Triton kernels, on a GPU or by Triton's interpreter.

tests/proofs/test_triton_interpreter.py starts pytest so that Triton interprets.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    sys.path.append(str(Path(__file__).parents[1] / "proofs/device"))
    import interpreter

    interpreter.install()


def pytest_itemcollected(item):
    if not INTERPRETED:
        item.add_marker("gpu")


@pytest.fixture
def device():
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(
    params=[torch.float32, torch.bfloat16, torch.float16, torch.float64],
    ids=lambda dtype: str(dtype)[6:],
)
def dtype(request):
    return request.param
