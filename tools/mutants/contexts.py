"""A plugin of pytest: each test is a context of coverage, also in the processes that it starts."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

coverage = importlib.import_module("coverage")  # only the mutants' environment has it
passed: dict[str, float] = {}  # seconds of each test that passed


def __getattr__(job: str):
    """Return a function for a rank of the pool to call, in the context of its test.

    Ranks are killed, so that each call saves what it reached.
    """
    if not job.startswith("["):
        raise AttributeError(job)
    module, name, test = json.loads(job)
    function = inspect.unwrap(getattr(importlib.import_module(module), name))

    def in_context(*args, **options):
        coverage.Coverage.current().switch_context(test)
        try:
            return function(*args, **options)
        finally:
            coverage.Coverage.current().save()

    return in_context


def pytest_configure() -> None:
    """Send the pool's jobs through `__getattr__` above."""
    Pool = importlib.import_module("pool").Pool
    run = Pool.run

    def run_in_context(self, size, function, *args, **options):
        job = json.dumps([function.__module__, function.__name__, os.environ["MUTANTS_TEST"]])
        stand_in = SimpleNamespace(__module__=__name__, __name__=job)
        return run(self, size, stand_in, *args, **options)

    Pool.run = run_in_context


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Open the test's context, here and in the commands that it starts."""
    os.environ["MUTANTS_TEST"] = item.nodeid
    coverage.Coverage.current().switch_context(item.nodeid)
    start, passed[item.nodeid] = time.monotonic(), 0.0
    result = yield
    if item.nodeid in passed:
        passed[item.nodeid] = time.monotonic() - start
    return result


def pytest_runtest_logreport(report) -> None:
    """Forget a test that fails or is skipped."""
    if not report.passed:
        passed.pop(report.nodeid, None)


def pytest_sessionfinish() -> None:
    """Write the seconds of the tests that passed."""
    Path(os.environ["MUTANTS_SECONDS"]).write_text(json.dumps(passed))
