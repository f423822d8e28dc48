"""How much of an all-reduce over a slow link hides under its GEMM.

Two ranks, a core and a thread each, in network namespaces of their own, gloo over a veth pair of 1,
2 or 5 Gbit/s (link.py): no second machine, no GPU. [M, K] x [K, N] in float32 with K = 4096 on each
rank and N = 2048: the forward of a row-parallel layer, the backward of a column-parallel one.

The variants take turns in every round: the op's GEMMs alone (a group of one rank), its all-reduce
alone, overlap=False, and overlap="auto" after tpk.tune. extra_info has three medians of the rounds'
ratios: auto against False, the ideal max(GEMM, all-reduce) against False, and the share of the
shorter of GEMM and all-reduce that auto hides. `python benchmarks/bench_link.py [RATE ...]` prints
a table; it takes a quarter of an hour.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from link import Link, missing
from timing import Rounds, hidden_share

import tpkernels as tpk

K, N, DTYPE = 4096, 2048, torch.float32
RATES, PASSES = (1, 2, 5), ("forward", "backward")  # Gbit/s
ROUNDS = {2048: 11, 8192: 5}  # by M, rows
VARIANTS = ("gemm", "all_reduce", "serial", "auto")


def tune(folder: str) -> None:
    os.environ["XDG_CACHE_HOME"] = folder  # the user's own calibration stays as it is
    tpk.tune(dist.group.WORLD, [(rows, K, N) for rows in ROUNDS], [DTYPE])


def op_of(layer, rows: int) -> Callable[[str, int], None]:
    """Returns the op that a layer's forward (row) or backward (column) runs: op(group, chunks)."""
    weight, ops = layer.weight.detach(), torch.ops.tpkernels
    sharded, unsharded = torch.randn(rows, K), torch.randn(rows, N)
    if isinstance(layer, tpk.nn.RowParallelLinear):
        return lambda group, chunks: ops.row_linear(
            sharded, weight, None, None, group, chunks, "bench"
        )
    needs = True, [True], [False]  # gradients of the input, the weights, the biases
    return lambda group, chunks: ops.column_linear_backward(
        [sharded], unsharded, [weight], *needs, group, chunks, "bench"
    )


def measure(rows: int, which: str, rounds: int) -> tuple[Rounds, str]:
    """Returns the seconds of each variant in each round, and auto's explanation.

    Collective: both ranks must call it.
    """
    group = dist.group.WORLD
    alone = [dist.new_group([rank]) for rank in range(group.size())][group.rank()]
    options: dict[str, Any] = dict(bias=False, group=group, dtype=DTYPE)
    if which == "backward":
        layer = tpk.nn.ColumnParallelLinear(N, K * group.size(), **options)
    else:
        layer = tpk.nn.RowParallelLinear(K * group.size(), N, **options)
    why = layer.explain(rows)
    chunks = int(re.search(r"schedule: (\d+) chunk", why)[1])
    op = op_of(layer, rows)
    buffer = torch.zeros(rows, N)
    calls = (
        lambda: op(alone.group_name, 1),
        lambda: dist.all_reduce(buffer),
        lambda: op(group.group_name, 1),
        lambda: op(group.group_name, chunks),
    )
    times: Rounds = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, seconds in zip(calls, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [seconds[1:] for seconds in times], why  # the first round warms up


def info(times: Rounds) -> dict[str, float]:
    """Returns medians of the rounds' own ratios."""
    gains, ideal_gains, hidden = [], [], []
    for gemm, all_reduce, serial, auto in zip(*times, strict=True):
        gains.append(serial / auto)
        ideal_gains.append(serial / max(gemm, all_reduce))
        hidden.append(hidden_share(gemm, all_reduce, auto))
    return {
        "auto against overlap=False": statistics.median(gains),
        "ideal against overlap=False": statistics.median(ideal_gains),
        "hidden": statistics.median(hidden),
    }


class Lab:
    """The link at one rate after the other: each rate is tuned once, each case measured once."""

    def __init__(self, link: Link, folder: str):
        self.link, self.folder = link, folder
        self.rate: float | None = None
        self.measured: dict[tuple, tuple[Rounds, str]] = {}

    def times(self, rate: float, rows: int, which: str) -> tuple[Rounds, str]:
        if rate != self.rate:
            self.link.set_rate(rate)
            self.link.run(tune, self.folder)
            self.rate = rate
        if (rate, rows, which) not in self.measured:
            self.measured[rate, rows, which] = self.link.run(measure, rows, which, ROUNDS[rows])[0]
        return self.measured[rate, rows, which]


@pytest.fixture(scope="module")
def lab():
    if missing():
        pytest.skip(missing())
    with tempfile.TemporaryDirectory() as folder, Link() as link:
        yield Lab(link, folder)


class Clock:
    """Shows pytest-benchmark the times that the ranks measured."""

    now = 0.0


@pytest.mark.benchmark(timer=lambda: Clock.now)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("rows", ROUNDS)
@pytest.mark.parametrize("rate", RATES)
def test_link(lab, benchmark, rate, rows, which, variant):
    times, why = lab.times(rate, rows, which)
    benchmark.group = f"{rate} Gbit/s, M={rows}, {which}"
    benchmark.extra_info.update(info(times), explain=why)
    seconds = iter(times[VARIANTS.index(variant)])

    def show():
        Clock.now += next(seconds)

    benchmark.pedantic(show, rounds=ROUNDS[rows])


def show_case(lab: Lab, rate: float, rows: int, which: str) -> None:
    """Prints a row of the table: milliseconds, gains, the share hidden, auto's chunks."""
    times, why = lab.times(rate, rows, which)
    medians = " ".join(f"{1e3 * statistics.median(seconds):7.1f}" for seconds in times)
    gain, ideal, hidden = info(times).values()
    chunks = re.search(r"schedule: (.*)", why)[1]
    ratios = f"{gain:9.2f}x {ideal:11.2f}x {hidden:7.0%}"
    print(f"{rate:6g} {rows:5} {which:8} {medians}     {ratios}  {chunks}", flush=True)


def main(rates: list[float]) -> None:
    if missing():
        sys.exit(f"bench_link: {missing()}")
    print(
        "Gbit/s     M pass        GEMM all-red   False    auto ms  "
        "auto/False  ideal/False  hidden  auto's chunks"
    )
    with tempfile.TemporaryDirectory() as folder, Link() as link:
        lab = Lab(link, folder)
        for rate in rates:
            for rows in ROUNDS:
                for which in PASSES:
                    show_case(lab, rate, rows, which)


if __name__ == "__main__":
    main([float(rate) for rate in sys.argv[1:]] or list(RATES))
