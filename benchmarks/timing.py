"""How contenders are timed, and what the ratios and efficiencies are made of.

Machines drift: only contenders that alternate within one run can be compared. A round is one block of calls of every contender, in an
order drawn anew each round; a contender's figure for the round is its block's median, and a ratio is taken round by round. The first
calls of a block are not counted: they find caches and heap as another contender left them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

BLOCK_SECONDS, MAX_CALLS = 0.02, 30  # of a block; one call at least
MIN_ROUNDS, MAX_ROUNDS = 5, 31
LONG_CALL, VERY_LONG_CALL = (
    0.05,
    0.25,
)  # seconds; of calls up to the first three are dropped from a block, up to the second one
FLUSH_BYTES = 256 << 20  # more than any GPU's L2

# Both make NCCL's collectives wait for, or record events on, the host's side: nothing overlaps any more (pytorch#143890).
BREAK_OVERLAP = {
    "TORCH_NCCL_ENABLE_TIMING": ("1", "Y", "YES", "T", "TRUE"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL",),
}


def refuse_environment(environ=os.environ) -> None:
    """Raises RuntimeError where a variable is set that breaks the overlap that is to be measured."""
    for name, values in BREAK_OVERLAP.items():
        if environ.get(name, "").upper() in values:
            raise RuntimeError(
                f"{name}={environ[name]} breaks the overlap that these benchmarks measure: unset {name}"
            )


@dataclass
class Contender:
    """`call` is what is timed. `verify` raises if its result is wrong. `alone`: rank 0 calls, the others wait. `around`: a context
    manager for its blocks. `memory`: bytes by kind."""

    call: Callable
    verify: Callable | None = None
    alone: bool = False
    around: Callable = contextlib.nullcontext
    memory: dict = field(default_factory=dict)


def block(call: Callable, count: int, device: str) -> list[float]:
    """Seconds of each of `count` calls. On a GPU by events, its L2 flushed before each."""
    if device == "cpu":
        times = [time.perf_counter()]
        for _ in range(count):
            call()
            times.append(time.perf_counter())
        return [b - a for a, b in zip(times, times[1:], strict=False)]
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(count)
    ]
    for start, end in events:
        scratch.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def paired(
    contenders: dict[str, Contender], world, seconds: float, smoke: bool = False
) -> dict[str, list[list[float]]]:
    """For each contender its rounds, each the seconds of the calls that count. All ranks call it; rank 0 decides how many.

    Args:
        world: has rank, device, barrier() and broadcast(object) -> rank 0's object. Its barrier must not spin.
        seconds: about how long the rounds may take together.
        smoke: two rounds of one call instead.
    """

    def run(name: str, count: int) -> list[float]:
        contender = contenders[name]
        world.barrier()
        if contender.alone and world.rank:
            return []
        with contender.around():
            return block(contender.call, count, world.device)

    plan, rounds = dict.fromkeys(contenders, (0, 1)), 2
    if not smoke:
        estimates = {}
        for name in contenders:
            first = world.broadcast(run(name, 1))
            estimates[name] = (
                first[0]
                if first[0] > LONG_CALL
                else statistics.median(world.broadcast(run(name, 3)))
            )
        for name, estimate in estimates.items():
            calls = max(1, min(MAX_CALLS, round(BLOCK_SECONDS / max(estimate, 1e-7))))
            plan[name] = (
                0 if estimate > VERY_LONG_CALL else 1 if estimate > LONG_CALL else 3,
                calls,
            )
        one_round = sum(estimates[name] * sum(plan[name]) for name in plan)
        rounds = world.broadcast(
            max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / max(one_round, 1e-7))))
        )
    results: dict[str, list[list[float]]] = {name: [] for name in contenders}
    order, dice = list(contenders), random.Random(0)
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            dropped, count = plan[name]
            results[name].append(run(name, dropped + count)[dropped:])
    world.barrier()
    return results


def medians(rounds: list[list[float]]) -> list[float]:
    return [statistics.median(times) for times in rounds]


def summary(values: list[float]) -> dict:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return {
        "median": statistics.median(values),
        "p10": tenths[0],
        "p90": tenths[-1],
        "rounds": len(values),
    }


def ratio(other: list[list[float]], ours: list[list[float]]) -> dict:
    """How many times our time the other's is: the quotients of the rounds' medians, summarised."""
    return summary([a / b for a, b in zip(medians(other), medians(ours), strict=True)])


def difference(first: list[list[float]], second: list[list[float]]) -> dict:
    """Seconds that the first takes beyond the second, round by round."""
    return summary([a - b for a, b in zip(medians(first), medians(second), strict=True)])


def hidden_share(gemm: float, collective: float, overlapped: float) -> float:
    """Overlap efficiency: what part of the shorter of the two vanished. 0: serial; 1: the ideal, max(gemm, collective)."""
    return (gemm + collective - overlapped) / min(gemm, collective)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def resident(device: str) -> int:
    """Bytes this process holds, what is free given back first."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS:")


def peak(call: Callable, device: str) -> int:
    """Bytes that a call holds at its peak beyond what was resident before."""
    before = resident(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    call()
    return max(0, _status("VmHWM:") - before)
