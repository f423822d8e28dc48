"""How long does an all-reduce take, by size, beside the kernels of others?"""

from __future__ import annotations

import timing
import torch
import torch.distributed as dist
from measure import close

CONTENDERS = ["tpkernels", "tpkernels, async", "torch", "vLLM", "SGLang", "DeepSpeed", "OpenMPI"]
SIZES = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20]
CASES = [
    dict(ranks=ranks, dtype=dtype, bytes=size)
    for ranks in (2, 4)
    for dtype in ("float32", "bfloat16")
    for size in SIZES
]
SMOKE = [dict(ranks=2, dtype="float32", bytes=4096)]


def contenders(world, names: list[str], dtype: str, bytes: int) -> dict[str, timing.Contender]:
    dtype = getattr(torch, dtype)
    made = {}

    def contender(peer, all_reduce) -> timing.Contender:
        zeros = torch.zeros(
            bytes // dtype.itemsize, dtype=dtype, device=world.device
        )  # whose sums stay zeros, call after call

        def verify():
            numbers = (
                torch.arange(zeros.numel(), device=world.device).remainder(7).to(dtype) + world.rank
            )
            expected = world.size * (numbers - world.rank) + sum(range(world.size))
            all_reduce(numbers)
            close(numbers, expected, 0)

        return timing.Contender(lambda: all_reduce(zeros), verify)

    for name in names:
        peer = world.peers[name.partition(",")[0]]
        if dtype not in peer.dtypes:
            continue
        if name.endswith("async"):
            made[name] = contender(
                peer,
                lambda t, group=peer.group: dist.all_reduce(t, group=group, async_op=True).wait(),
            )
        else:
            made[name] = contender(peer, peer.all_reduce)
    return made


def components(rounds: dict) -> dict:
    """Seconds."""
    if "tpkernels, async" not in rounds:
        return {}
    return {
        "async overhead": timing.difference(rounds["tpkernels, async"], rounds["tpkernels"])[
            "median"
        ]
    }


def test_all_reduce(replay):
    replay()
