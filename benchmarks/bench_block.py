"""A pre-norm transformer block (hidden 1024, 16 heads, causal), beside every peer and one process.

The one process has the unsharded block and all cores.
"""

from __future__ import annotations

import layers

CONTENDERS = ["tpkernels", *layers.PARTS, *layers.STEPS, *layers.PEERS, "one process"]
CASES = layers.cases("forward") + layers.cases("training", layers.TRAINING_TOKENS)
SMOKE = [dict(ranks=2, dtype="float32", mode="training", tokens=16, hidden=64)]
components = layers.components


def contenders(world, names: list[str], **params):
    return layers.contenders(world, names, "block", **params)


def test_block(replay):
    replay()
