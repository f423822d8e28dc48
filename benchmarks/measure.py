"""What a rank does for a case: builds the contenders, checks that their results are right, times them by turns."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import timing


@dataclass(frozen=True)
class Effort:
    """About `seconds` of rounds a case; `smoke`: two rounds of one call each, only to see that it runs."""

    seconds: float = 1.5
    smoke: bool = False


def case(world, module: str, names: list[str], params: dict, effort: Effort) -> dict | None:
    """{"rounds": {contender: rounds}, "memory": {contender: bytes by kind}, "absent": {peer: why}} on rank 0."""
    bench = importlib.import_module(module)
    params = {key: value for key, value in params.items() if key != "ranks"}
    contenders = bench.contenders(
        world, [name for name in names if name not in world.absent], **params
    )
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
    return {
        "rounds": rounds,
        "memory": {name: c.memory for name, c in contenders.items()},
        "absent": world.absent,
    }


def close(out, expected, tolerance: float) -> None:
    """Raises ValueError where `out` is further from `expected` than `tolerance` of its largest value."""
    if out.shape != expected.shape:
        raise ValueError(f"its result is {list(out.shape)}, expected {list(expected.shape)}")
    error = (out.float() - expected.float()).abs().max().item()
    limit = tolerance * expected.float().abs().max().item()
    if not error <= limit:
        raise ValueError(f"its result is wrong by {error:.3g}, more than {limit:.3g}")
