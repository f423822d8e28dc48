import os
import sys

import pytest
import torch

sys.path[:0] = [os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "device")]

from pool import Pool  # noqa: E402

# The kernels' tests need triton's interpreter, which test_kernels.py starts in a process of its own, or a GPU.
collect_ignore = (
    [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["kernels"]
)


@pytest.fixture(scope="session")
def pool():
    """pool.run(n, function, *args): the results of a module-level function on n gloo ranks."""
    pool = Pool()
    yield pool
    pool.close()
    pool.folder.cleanup()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(
                    pytest.mark.skip(
                        reason="needs a GPU and a CUDA build of torch: `make gpu-day` on such a machine runs it"
                    )
                )
