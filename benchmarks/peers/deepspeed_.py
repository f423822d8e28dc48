"""DeepSpeed's all-reduce over shared memory, compiled on first use from the sources in its package, as DeepSpeed does it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil

import torch

from . import cpu_only, plain


def unavailable() -> str | None:
    return cpu_only("DeepSpeed") or (
        None if shutil.which("g++") else "DeepSpeed compiles its all-reduce: needs g++"
    )


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        from torch.utils.cpp_extension import load

        sources = os.path.join(
            importlib.util.find_spec("deepspeed").submodule_search_locations[0],
            "ops",
            "csrc",
            "cpu",
            "comm",
        )

        def build():
            flags = ["-O2", "-fopenmp"]  # op_builder/cpu/comm.py's
            return load(
                "deepspeed_shm_comm",
                [f"{sources}/shm_interface.cpp", f"{sources}/shm.cpp"],
                extra_cflags=flags,
            )

        if world.rank == 0:
            module = build()
        world.barrier()
        if world.rank:
            module = build()
        module.initialize(world.size, world.rank)
        world.barrier()
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_{world.rank}"
        with contextlib.suppress(OSError):
            os.unlink(f"/dev/shm/{name}")  # all have mapped it; it never does

    def all_reduce(self, tensor) -> None:
        torch.ops.deepspeed.inference_all_reduce_(tensor)
