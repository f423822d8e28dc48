"""DeepSpeed's all-reduce over shared memory, compiled on first use as DeepSpeed itself does it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from types import ModuleType

import torch
from torch import Tensor

from . import plain
from .registry import cpu_only


def unavailable() -> str | None:
    if shutil.which("g++") is None:
        return cpu_only("DeepSpeed") or "DeepSpeed compiles its all-reduce: needs g++"
    return cpu_only("DeepSpeed")


def _build() -> ModuleType:
    """Compiles DeepSpeed's sources with the flags of its op_builder/cpu/comm.py, or loads them."""
    from torch.utils.cpp_extension import load  # only the ranks that measure DeepSpeed need it

    spec = importlib.util.find_spec("deepspeed")
    folder = os.path.join(spec.submodule_search_locations[0], "ops", "csrc", "cpu", "comm")
    sources = [os.path.join(folder, name) for name in ("shm_interface.cpp", "shm.cpp")]
    return load("deepspeed_shm_comm", sources, extra_cflags=["-O2", "-fopenmp"])


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        if world.rank == 0:
            module = _build()
        world.barrier()
        if world.rank:
            module = _build()
        module.initialize(world.size, world.rank)
        world.barrier()
        address = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{world.rank}"
        with contextlib.suppress(OSError):
            os.unlink(f"/dev/shm/{name}")  # all ranks have mapped it; DeepSpeed never unlinks it

    def all_reduce(self, tensor: Tensor) -> None:
        torch.ops.deepspeed.inference_all_reduce_(tensor)
