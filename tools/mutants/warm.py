"""Forks of this process run pytest: it has imported what is slow and no mutant can change.

As a plugin of that pytest it lets the pool of ranks fork too. Only a process without other threads
does: a fork would not have them, and might wait for them for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

IMPORTED = ("torch", "torch.distributed.tensor.debug", "hypothesis", "transformers")


def import_what_is_slow() -> None:
    """Import torch and pytest's plugins, with one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in IMPORTED:
        importlib.import_module(name)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    assert _has_one_thread(), "a library that was imported has started a thread"


def run(arguments: list[str], tree: Path, environment: dict[str, str], limit: float) -> tuple:
    """Run pytest in the tree, in a fork of this process that is killed when the time is up.

    Returns:
        the exit status, or None if time was up; and what pytest wrote.
    """
    output = tree / "pytest-output.txt"
    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            os.setsid()
            for stream, name in ((1, str(output)), (2, os.devnull)):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            os.chdir(tree)
            os.environ.clear()
            os.environ.update(environment)
            sys.path.insert(0, str(tree))
            sys.dont_write_bytecode = True
            os._exit(importlib.import_module("pytest").main(["-p", __name__, *arguments]))
        os._exit(1)
    end, how = time.monotonic() + limit, os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (ended := os.waitid(os.P_PID, child, how)) is None and time.monotonic() < end:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ended and ended.si_status, output.read_text() if output.exists() else ""


def _has_one_thread() -> bool:
    return len(os.listdir("/proc/self/task")) == 1


def pytest_configure() -> None:
    """Let the pool fork its ranks where it would spawn them."""
    Pool = importlib.import_module("pool").Pool
    start = Pool._start

    def start_by_fork(self, rank):
        if self.context.get_start_method() != "forkserver":
            self.context = multiprocessing.get_context("fork" if _has_one_thread() else "spawn")
        return start(self, rank)

    Pool._start = start_by_fork
