"""A row-parallel layer, [tokens, 4096] -> [tokens, 1024] over the ranks.

It shows how much of the all-reduce hides under the GEMM.
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
CASES = layers.cases("forward") + layers.cases("training")
SMOKE = [
    dict(ranks=2, dtype="float32", mode=mode, tokens=16, hidden=64)
    for mode in ("forward", "training")
]
components = layers.components


def contenders(world, names: list[str], **params):
    return layers.contenders(world, names, "row", **params)


def test_row_linear(replay):
    replay()
