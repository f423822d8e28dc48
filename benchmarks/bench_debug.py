"""The MLP on 512 tokens whose ranks compare each collective, by TPKERNELS_DEBUG=1, and without."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import layers
import timing

CONTENDERS = ["tpkernels", "tpkernels, debug"]
CASES = [
    dict(ranks=2, dtype="float32", mode=mode, hidden=hidden)
    for mode in ("forward", "training")
    for hidden in (256, 512, 1024)
]
SMOKE = [dict(ranks=2, dtype="float32", mode="training", hidden=64)]


@contextlib.contextmanager
def debugging() -> Iterator[None]:
    """Switches the comparison on; the C++ side looks at the variable in every call."""
    os.environ["TPKERNELS_DEBUG"] = "1"
    try:
        yield
    finally:
        del os.environ["TPKERNELS_DEBUG"]


def contenders(world, names: list[str], **params) -> dict[str, timing.Contender]:
    plain = layers.contenders(world, ["tpkernels"], "mlp", tokens=512, **params)["tpkernels"]
    return {
        name: dataclasses.replace(plain, around=debugging) if name.endswith("debug") else plain
        for name in names
    }


def components(rounds: dict[str, timing.Rounds]) -> dict[str, float]:
    return {}


def test_debug(replay):
    replay()
