"""Megatron's MLP, 1024 -> 4096 -> gelu -> 1024, beside every peer, and one process that has both cores and the whole layer."""

from __future__ import annotations

import layers

CONTENDERS = ["tpkernels", *layers.PARTS, *layers.PEERS, "one process"]
CASES = (
    layers.cases("forward")
    + layers.cases("training", layers.TRAINING_TOKENS)
    + layers.cases("forward", (16, 512), 4)
)
SMOKE = [
    dict(ranks=2, dtype="float32", mode=mode, tokens=16, hidden=64)
    for mode in ("forward", "training")
]
components = layers.components


def contenders(world, names, **params):
    return layers.contenders(world, names, "mlp", **params)


def test_mlp(replay):
    replay()
