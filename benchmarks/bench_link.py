"""How much of an all-reduce over a slow link hides under its GEMM? Two ranks, a core and a thread each, in network namespaces of their
own, gloo over a veth pair limited to 1, 2 or 5 Gbit/s (link.py): no second machine, no GPU.

[M, K] x [K, N], K = 4096 on each rank, N = 2048, float32: the forward of a row-parallel layer, the backward of a column-parallel one. In every
round the variants take turns: the op's GEMMs alone (a group of one rank), its all-reduce alone, overlap=False, and overlap="auto" after
tpk.tune. extra_info has, from the rounds' ratios: auto against False, the ideal max(GEMM, all-reduce) against False, and the share of
the shorter of GEMM and all-reduce that auto hides. `python benchmarks/bench_link.py [RATE ...]` prints a table; quarter of an hour.
"""

import os
import statistics
import sys
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
from link import Link, missing

import tpkernels as tpk
from tpkernels.schedule.explain import explain

INNER, FEATURES, DTYPE = 4096, 2048, torch.float32
RATES, ROUNDS, PASSES = (1, 2, 5), {2048: 11, 8192: 5}, ("forward", "backward")
VARIANTS = ("gemm", "all_reduce", "serial", "auto")


def tune(folder: str) -> None:
    os.environ["XDG_CACHE_HOME"] = folder  # the user's own tables stay as they are
    tpk.tune(dist.group.WORLD, [(rows, INNER, FEATURES) for rows in ROUNDS], [DTYPE])


def measure(rows: int, which: str, rounds: int) -> tuple[list[list[float]], str]:
    """Seconds of each variant in each round, and why auto does what it does."""
    group, backward = tpk.group.resolve_group(dist.group.WORLD), which == "backward"
    alone = [dist.new_group([rank]) for rank in range(group.size)][group.rank].group_name
    chunks = tpk.schedule.choose(
        "auto", rows, FEATURES * DTYPE.itemsize, group, INNER, DTYPE, backward
    ).chunks
    a, message = torch.randn(rows, INNER), torch.zeros(rows, FEATURES)
    x, weight = (
        torch.randn(rows, FEATURES),
        torch.randn(INNER, FEATURES) if backward else torch.randn(FEATURES, INNER),
    )

    def op(name, chunks):
        if backward:
            return lambda: torch.ops.tpkernels.column_linear_backward(
                [a], x, [weight], True, [True], [False], name, chunks, "bench"
            )
        return lambda: torch.ops.tpkernels.row_linear(a, weight, None, None, name, chunks, "bench")

    calls = (
        op(alone, 1),
        lambda: dist.all_reduce(message),
        op(group.name, 1),
        op(group.name, chunks),
    )
    times = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, seconds in zip(calls, times, strict=True):
            dist.barrier()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [seconds[1:] for seconds in times], explain(
        "auto", rows, FEATURES, group, INNER, DTYPE, backward
    )


def info(times: list[list[float]]) -> dict[str, float]:
    """Medians over the rounds' own ratios."""
    rounds = list(zip(*times, strict=True))
    return {
        "auto against overlap=False": statistics.median(
            serial / auto for _, _, serial, auto in rounds
        ),
        "ideal against overlap=False": statistics.median(
            serial / max(gemm, message) for gemm, message, serial, _ in rounds
        ),
        "hidden": statistics.median(
            (gemm + message - auto) / min(gemm, message) for gemm, message, _, auto in rounds
        ),
    }


class Lab:
    """The link at one rate after the other, each tuned once, each case measured once."""

    def __init__(self, link: Link, folder: str):
        self.link, self.folder, self.rate, self.measured = link, folder, None, {}

    def times(self, rate: float, rows: int, which: str) -> tuple[list[list[float]], str]:
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
    """What pytest-benchmark reads: it shows what the ranks measured."""

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


def main(rates):
    if missing():
        sys.exit(f"bench_link: {missing()}")
    print(
        f"{'Gbit/s':>6} {'M':>5} {'pass':8} {'GEMM':>7} {'all-red':>7} {'False':>7} {'auto':>7} ms  auto/False  ideal/False  hidden  auto's chunks"
    )
    with tempfile.TemporaryDirectory() as folder, Link() as link:
        lab = Lab(link, folder)
        for rate in rates:
            for rows in ROUNDS:
                for which in PASSES:
                    times, why = lab.times(rate, rows, which)
                    medians = " ".join(
                        f"{1e3 * statistics.median(seconds):7.1f}" for seconds in times
                    )
                    gain, ideal, hidden = info(times).values()
                    chunks = next(
                        line for line in why.splitlines() if line.startswith("schedule:")
                    ).removeprefix("schedule: ")
                    print(
                        f"{rate:6g} {rows:5} {which:8} {medians}     {gain:9.2f}x {ideal:11.2f}x {hidden:7.0%}  {chunks}",
                        flush=True,
                    )


if __name__ == "__main__":
    main([float(rate) for rate in sys.argv[1:]] or RATES)
