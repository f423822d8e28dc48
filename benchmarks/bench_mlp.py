"""Megatron's MLP, 1024 -> 4096 -> gelu -> 1024, beside every peer and one process.

The one process has the unsharded MLP and all cores.
"""

from __future__ import annotations

import layers

CONTENDERS = ["tpkernels", *layers.PARTS, *layers.STEPS, *layers.PEERS, "one process"]
CASES = (
    layers.cases("forward")
    + layers.cases("training", layers.TRAINING_TOKENS)
    + layers.cases("forward", (16, 512), ranks=4)
)
SMOKE = [
    dict(ranks=2, dtype="float32", mode=mode, tokens=16, hidden=64)
    for mode in ("forward", "training")
]
components = layers.components


def contenders(world, names: list[str], **params):
    return layers.contenders(world, names, "mlp", **params)


def test_mlp(replay):
    replay()
