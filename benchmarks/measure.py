"""A rank's work for a case: build the contenders, check their results, time them by turns."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import timing
from torch import Tensor


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: about how long the rounds of one case take.
        smoke: two rounds of one call each instead, only to see that the case runs.
    """

    seconds: float = 1.5
    smoke: bool = False


def case(world, module: str, names: list[str], params: dict, effort: Effort) -> dict | None:
    """Measures one case.

    Collective: every rank must call it.

    Returns:
        On rank 0 {"rounds": {contender: rounds}, "memory": {contender: bytes by kind},
        "absent": {peer: why}}; None on the others.

    Raises:
        RuntimeError: a contender's result is wrong.
    """
    bench: Any = importlib.import_module(module)
    params = {key: value for key, value in params.items() if key != "ranks"}
    present = [name for name in names if name not in world.absent]
    contenders = bench.contenders(world, present, **params)
    for name, contender in contenders.items():
        if contender.verify is not None:
            try:
                contender.verify()
            except Exception as error:
                raise RuntimeError(f"{name} in {params}: {error}") from error
    rounds = timing.paired(contenders, world, effort.seconds, effort.smoke)
    for contender in contenders.values():
        world.barrier()
        if not contender.alone or world.rank == 0:
            with contender.around():
                contender.memory["peak of a call"] = timing.peak(contender.call, world.device)
    world.barrier()
    if world.rank:
        return None
    memory = {name: contender.memory for name, contender in contenders.items()}
    return {"rounds": rounds, "memory": memory, "absent": world.absent}


def close(out: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises ValueError if `out` differs from `expected` by more than `tolerance` x its maximum."""
    if out.shape != expected.shape:
        raise ValueError(f"its result is {list(out.shape)}, expected {list(expected.shape)}")
    error = (out.float() - expected.float()).abs().max().item()
    limit = tolerance * expected.float().abs().max().item()
    if not error <= limit:
        raise ValueError(f"its result is wrong by {error:.3g}, more than {limit:.3g}")
