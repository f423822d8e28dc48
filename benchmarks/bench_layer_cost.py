"""The time that a layer itself costs: one token and 64 features, where nothing else takes long.

It is measured beside bare F.linear, and with a gradient beside F.linear and its all-reduce.
`python benchmarks/bench_layer_cost.py [CHECKOUT ...]` measures the tpkernels of other checkouts
with this file, by turns, and prints the ratios of the later ones to the first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import layers
import stock
import timing
import torch
import torch.nn.functional as F
from measure import Effort, close
from team import HERE, Team
from torch import Tensor

FEATURES = 64  # hidden; the row layer is [4 * 64 / ranks, 64]
CONTENDERS = ["tpkernels", "by hand", "DTensor", "megatron-core", "fairscale"]
CASES = [
    dict(ranks=ranks, layer=layer, mode=mode)
    for ranks, mode in ((1, "forward"), (2, "training"))
    for layer in ("row", "column")
]
SMOKE = CASES[-1:]


def by_hand(
    all_reduce: Callable[[Tensor], None],
    layer: str,
    x: Tensor,  # [1, K]
    weight: Tensor,  # [N, K]
    bias: Tensor,  # [N]
    grad: Tensor | None,  # [1, N]
) -> Callable[[], Tensor]:
    """Returns the least that gives the layer's result: F.linear and the all-reduce it needs.

    Args:
        grad: the output's gradient; None for forward, without the all-reduce.
    """

    def forward() -> Tensor:
        with torch.no_grad():
            return F.linear(x, weight, bias)

    def training() -> Tensor:
        weight.grad = bias.grad = x.grad = None
        y = F.linear(x, weight, bias)
        if layer == "row":
            all_reduce(y.detach())
        y.backward(grad)
        if layer == "column":
            all_reduce(x.grad)
        return y

    return forward if grad is None else training


def contenders(world, names: list[str], layer: str, mode: str) -> dict[str, timing.Contender]:
    names = [name for name in names if name != "by hand"]
    made = layers.contenders(world, names, layer, "float32", mode, 1, FEATURES)
    full = stock.make(layer, FEATURES, torch.float32, world.device)
    weight, bias = full.weight.detach(), full.bias.detach()
    if layer == "row":
        weight = weight.chunk(world.size, 1)[world.rank]
    else:
        weight, bias = weight.chunk(world.size)[world.rank], bias.chunk(world.size)[world.rank]
    n, k = weight.shape
    leaves = torch.randn(1, k, device=world.device), weight.clone(), bias.clone()
    grad = None
    if mode == "training":
        grad = torch.randn(1, n, device=world.device)
        for leaf in leaves:
            leaf.requires_grad_()
    call = by_hand(world.peers["tpkernels"].all_reduce, layer, *leaves, grad)
    expected = F.linear(*leaves).detach()

    def verify() -> None:
        close(call(), expected, 1e-5)

    return made | {"by hand": timing.Contender(call, verify if world.size == 1 else None)}


def components(rounds: dict[str, timing.Rounds]) -> dict[str, float]:
    """Returns the seconds that tpkernels takes beyond the bare ops."""
    return {"own cost": timing.difference(rounds["tpkernels"], rounds["by hand"])["median"]}


def test_layer_cost(replay):
    replay()


class Cost(NamedTuple):
    """The medians of one case in one process.

    Attributes:
        call: seconds.
        own: seconds beyond the bare ops.
        relative: call / the bare ops, round by round.
    """

    call: float
    own: float
    relative: float


def measure(checkout: Path, seconds: float) -> list[Cost]:
    """Returns the cost of each of CASES."""
    found = []
    for ranks in (1, 2):
        team = Team(ranks, ["tpkernels"], checkout)
        try:
            for case in (case for case in CASES if case["ranks"] == ranks):
                args = "bench_layer_cost", ["tpkernels", "by hand"], case, Effort(seconds)
                rounds = team.run("measure", "case", *args)[0]["rounds"]
                call = statistics.median(timing.medians(rounds["tpkernels"]))
                relative = timing.ratio(rounds["tpkernels"], rounds["by hand"])["median"]
                found.append(Cost(call, components(rounds)["own cost"], relative))
        finally:
            team.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = [HERE.parent]
    parser.add_argument("checkouts", nargs="*", type=Path, default=here, help="with a built _C")
    parser.add_argument("--rounds", type=int, default=9, help="of all checkouts, by turns")
    parser.add_argument("--seconds", type=float, default=1.5, help="of a case in a round")
    options = parser.parse_args()
    checkouts = [checkout.resolve() for checkout in options.checkouts]
    rounds = [
        [measure(checkout, options.seconds) for checkout in checkouts]
        for _ in range(options.rounds)
    ]
    for i, case in enumerate(CASES):
        print(f"{case['layer']}, TP={case['ranks']}, {case['mode']}: µs, medians of the rounds")
        for j, checkout in enumerate(checkouts):
            costs = [measured[j][i] for measured in rounds]
            call, own, relative = map(statistics.median, zip(*costs, strict=True))
            first = [measured[0][i].relative for measured in rounds]
            change = timing.summary([c.relative / f for c, f in zip(costs, first, strict=True)])
            spread = f"{change['p10']:.3f}-{change['p90']:.3f}"
            print(
                f"  {checkout}: call {1e6 * call:.2f}, own cost {1e6 * own:.2f}, {relative:.3f}x "
                f"of the bare ops; that is {change['median']:.3f} ({spread}) of the first's"
            )


if __name__ == "__main__":
    main()
