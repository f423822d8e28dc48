"""The pool of ranks, and the skip of tests that need a GPU."""

import os

import pytest
import torch
from pool import Pool

NO_GPU = pytest.mark.skip(
    reason="needs a GPU and a CUDA build of torch: `make gpu-day` on such a machine runs it"
)

# The kernels' tests need a GPU or Triton's interpreter, which proofs/test_triton_interpreter.py
# starts in a process of its own.
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore = ["kernels"]


@pytest.fixture(scope="session")
def pool():
    """Return the pool whose `run(n, function, *args)` calls a function on n gloo ranks."""
    with Pool() as pool:
        yield pool


@pytest.fixture(scope="session")
def shm_pool():
    """Return a pool whose ranks communicate by shared memory."""
    with Pool(backend="shm") as pool:
        yield pool


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(NO_GPU)
