"""How contenders are timed, and how ratios and efficiencies are computed from the times.

Machines drift: only contenders that alternate within one run can be compared. A round is one
block of calls of every contender, in an order drawn anew each round. A contender's figure for the
round is its block's median, and a ratio is taken round by round. The first calls of a block are
not counted: they find caches and heap as another contender left them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

BLOCK_SECONDS, MAX_CALLS = 0.02, 30  # of a block, which has at least one call
MIN_ROUNDS, MAX_ROUNDS = 5, 31
DROPPED_CALLS = 3  # the first of a block
LONG_CALL = 0.05  # seconds, from which one call is dropped instead
VERY_LONG_CALL = 0.25  # seconds, from which none is
FLUSH_BYTES = 256 << 20  # more than any GPU's L2

Rounds = list[list[float]]  # seconds of the calls that count, round by round

# Both make NCCL's collectives wait for, or record events on, the host's side: nothing overlaps any
# more (pytorch#143890).
BREAK_OVERLAP = {
    "TORCH_NCCL_ENABLE_TIMING": ("1", "Y", "YES", "T", "TRUE"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL",),
}


def refuse_environment(environ: Mapping[str, str] = os.environ) -> None:
    """Raises RuntimeError if a variable is set that breaks the overlap to be measured."""
    for name, values in BREAK_OVERLAP.items():
        if environ.get(name, "").upper() in values:
            raise RuntimeError(
                f"{name}={environ[name]} breaks the overlap that these benchmarks measure: "
                f"unset {name}"
            )


@dataclass
class Contender:
    """A call to time.

    Attributes:
        call: is timed.
        verify: raises if the call's result is wrong.
        alone: rank 0 calls, the others wait.
        around: makes the context manager in which its blocks run.
        memory: bytes by kind.
    """

    call: Callable[[], Any]
    verify: Callable[[], None] | None = None
    alone: bool = False
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext
    memory: dict[str, int] = field(default_factory=dict)


class Block(NamedTuple):
    """How many calls of a block are dropped, and how many count after them."""

    dropped: int
    counted: int


def block(call: Callable[[], Any], count: int, device: str) -> list[float]:
    """Returns the seconds of each of `count` calls: on a GPU by events, its L2 flushed before."""
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


def _run(contender: Contender, world, count: int) -> list[float]:
    world.barrier()
    if contender.alone and world.rank:
        return []
    with contender.around():
        return block(contender.call, count, world.device)


def _estimate(contender: Contender, world) -> float:
    """Returns about how many seconds a call takes, the same on every rank."""
    first = world.broadcast(_run(contender, world, 1))
    if first[0] > LONG_CALL:
        return first[0]
    return statistics.median(world.broadcast(_run(contender, world, 3)))


def _block_of(estimate: float) -> Block:
    """Returns the block that suits a call of so many seconds."""
    counted = max(1, min(MAX_CALLS, round(BLOCK_SECONDS / max(estimate, 1e-7))))
    if estimate > VERY_LONG_CALL:
        return Block(0, counted)
    if estimate > LONG_CALL:
        return Block(1, counted)
    return Block(DROPPED_CALLS, counted)


def paired(
    contenders: dict[str, Contender], world, seconds: float, smoke: bool = False
) -> dict[str, Rounds]:
    """Times the contenders by turns; rank 0 decides how many calls and rounds.

    Collective: every rank must call it.

    Args:
        world: has rank, device, barrier() and broadcast(object) -> rank 0's object. Its barrier
            must not spin.
        seconds: about how long the rounds may take together.
        smoke: two rounds of one call instead.

    Returns:
        The rounds of each contender.
    """
    blocks, rounds = dict.fromkeys(contenders, Block(0, 1)), 2
    if not smoke:
        estimates = {name: _estimate(contenders[name], world) for name in contenders}
        blocks = {name: _block_of(estimate) for name, estimate in estimates.items()}
        one_round = sum(estimates[name] * sum(blocks[name]) for name in blocks)
        wanted = int(seconds / max(one_round, 1e-7))
        rounds = world.broadcast(max(MIN_ROUNDS, min(MAX_ROUNDS, wanted)))
    results: dict[str, Rounds] = {name: [] for name in contenders}
    order = list(contenders)
    dice = random.Random(0)  # every rank draws the same order
    for _ in range(rounds):
        dice.shuffle(order)
        for name in order:
            times = _run(contenders[name], world, sum(blocks[name]))
            results[name].append(times[blocks[name].dropped :])
    world.barrier()
    return results


def medians(rounds: Rounds) -> list[float]:
    return [statistics.median(times) for times in rounds]


def summary(values: list[float]) -> dict[str, float]:
    """Returns the median, the 10th and 90th percentile and the number of values."""
    tenths = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
    return {
        "median": statistics.median(values),
        "p10": tenths[0],
        "p90": tenths[-1],
        "rounds": len(values),
    }


def ratio(other: Rounds, ours: Rounds) -> dict[str, float]:
    """Summarises other's time / our time, the quotients of the rounds' medians."""
    return summary([a / b for a, b in zip(medians(other), medians(ours), strict=True)])


def difference(first: Rounds, second: Rounds) -> dict[str, float]:
    """Summarises the seconds that the first takes beyond the second, round by round."""
    return summary([a - b for a, b in zip(medians(first), medians(second), strict=True)])


def hidden_share(gemm: float, collective: float, overlapped: float) -> float:
    """Returns the share of the shorter of the two that overlap hides.

    0 is serial (gemm + collective), 1 the ideal (max(gemm, collective)).
    """
    return (gemm + collective - overlapped) / min(gemm, collective)


def _status(key: str) -> int:
    """Returns a size in bytes from /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def resident(device: str) -> int:
    """Returns the bytes this process holds, after it gave back all that is free."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS:")


def peak(call: Callable[[], Any], device: str) -> int:
    """Returns the bytes that a call holds at its peak beyond those resident before."""
    before = resident(device)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the high-water mark
    call()
    return max(0, _status("VmHWM:") - before)
