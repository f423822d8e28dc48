"""The time of an all-reduce by its size, beside the shared-memory kernels of others."""

from __future__ import annotations

from collections.abc import Callable

import timing
import torch
import torch.distributed as dist
from measure import close
from torch import Tensor

CONTENDERS = ["tpkernels", "tpkernels, async", "torch", "vLLM", "SGLang", "DeepSpeed", "OpenMPI"]
SIZES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]  # bytes
CASES = [
    dict(ranks=ranks, dtype=dtype, bytes=size)
    for ranks in (2, 4)
    for dtype in ("float32", "bfloat16")
    for size in SIZES
]
SMOKE = [dict(ranks=2, dtype="float32", bytes=4096)]


def contender(
    world, all_reduce: Callable[[Tensor], None], dtype: torch.dtype, count: int
) -> timing.Contender:
    """Returns the all-reduce of `count` zeros, whose sums stay zeros call after call."""
    zeros = torch.zeros(count, dtype=dtype, device=world.device)

    def verify() -> None:
        index = torch.arange(count, device=world.device).remainder(7).to(dtype)
        numbers = index + world.rank
        all_reduce(numbers)
        close(numbers, world.size * index + sum(range(world.size)), 0)

    return timing.Contender(lambda: all_reduce(zeros), verify)


def contenders(world, names: list[str], dtype: str, bytes: int) -> dict[str, timing.Contender]:
    torch_dtype = getattr(torch, dtype)
    made = {}
    for name in names:
        peer = world.peers[name.partition(",")[0]]
        if torch_dtype not in peer.dtypes:
            continue

        def asynchronous(tensor: Tensor, peer=peer) -> None:
            dist.all_reduce(tensor, group=peer.group, async_op=True).wait()

        all_reduce = asynchronous if name.endswith("async") else peer.all_reduce
        made[name] = contender(world, all_reduce, torch_dtype, bytes // torch_dtype.itemsize)
    return made


def components(rounds: dict[str, timing.Rounds]) -> dict[str, float]:
    """Returns the seconds that the c10d call with async_op=True takes beyond tpk.all_reduce_."""
    if "tpkernels, async" not in rounds:
        return {}
    overhead = timing.difference(rounds["tpkernels, async"], rounds["tpkernels"])
    return {"async overhead": overhead["median"]}


def test_all_reduce(replay):
    replay()
