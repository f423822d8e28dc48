import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))

from pool import Pool

# The kernels' tests need a GPU or triton's interpreter, which test_kernels.py starts in a process of its own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["kernels"]


@pytest.fixture(scope="session")
def pool():
    """pool.run(n, function, *args): the results of a module-level function on n gloo ranks."""
    pool = Pool()
    yield pool
    pool.close()
    pool.folder.cleanup()


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU and a CUDA build of torch: `make gpu-day` on such a machine runs it"))
