"""Fresh processes for Triton: whether it compiles or interprets is settled when it is imported, so
neither may depend on this process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor


def _environment(folder: str, interpret: bool) -> None:
    for name in [
        name for name in os.environ if name.startswith("TRITON_")
    ]:  # a cache, another ptxas, an override of the IR
        del os.environ[name]
    os.environ["TRITON_CACHE_DIR"] = folder
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"


@contextlib.contextmanager
def pool(processes: int, interpret: bool = False):
    """A ProcessPoolExecutor whose workers import Triton in a clean environment with an empty cache;
    they are killed on leaving.
    """
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with tempfile.TemporaryDirectory(prefix="tpkernels-triton-") as folder:
        executor = ProcessPoolExecutor(processes, context, _environment, (folder, interpret))
        try:
            yield executor
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - before:
                worker.kill()
                worker.join()
