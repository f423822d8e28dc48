"""A column-parallel layer, [tokens, 1024] -> [tokens, 4096] over the ranks.

Its backward all-reduces the input's gradient.
"""

from __future__ import annotations

import layers

CONTENDERS = [
    "tpkernels",
    *layers.PARTS,
    "tpkernels, 4 chunks",
    *layers.STEPS,
    *(peer for peer in layers.PEERS if peer != "torch.compile"),
]
CASES = layers.cases("training")  # forward is the GEMM alone
SMOKE = [dict(ranks=2, dtype="float32", mode="training", tokens=16, hidden=64)]
components = layers.components


def contenders(world, names: list[str], **params):
    return layers.contenders(world, names, "column", **params)


def test_column_linear(replay):
    replay()
