"""Run functions and tests on ranks: processes that stay alive, and a fresh world for each call.

The processes stay alive because importing torch costs seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import multiprocessing as mp
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest

TIMEOUT = 240  # seconds that a call may take on a loaded machine
DIED = 0.0  # the time of a death: before all errors, which it explains
GRACE = 10  # seconds that the other ranks have once one has failed: they may wait for it


def run_on_ranks(*sizes: int, pool: str = "pool") -> Callable[[Callable], Callable]:
    """Run the decorated test on every rank of a world of each size.

    The decorator stands next to the function, below `pytest.mark.parametrize`, whose parameters
    and fixtures are handed to the ranks. The ids then start with the number of ranks.

    Args:
        sizes: the numbers of ranks; none where `ranks` is parametrized outside.
        pool: the name of the fixture that is the pool.
    """

    def decorate(function):
        def test(request, ranks, **arguments):
            request.getfixturevalue(pool).run(ranks, function, **arguments)

        parameters = list(inspect.signature(function).parameters.values())
        outer = list(inspect.signature(test).parameters.values())[:2]
        test.__signature__ = inspect.Signature([*outer, *parameters])
        test.__name__ = function.__name__
        test.__qualname__ = function.__qualname__
        test.__module__ = function.__module__
        test.__doc__ = function.__doc__
        test.__wrapped__ = function  # pytest shows its file and line; a rank calls it
        return pytest.mark.parametrize("ranks", sizes)(test) if sizes else test

    return decorate


def _function(module: str, name: str) -> Callable:
    return inspect.unwrap(getattr(importlib.import_module(module), name))


def _forget_dtensor_plans() -> None:
    """Clear DTensor's cache, whose entries name process groups of the world that has ended."""
    if "torch.distributed.tensor" in sys.modules:
        debug = importlib.import_module("torch.distributed.tensor.debug")
        debug._clear_sharding_prop_cache()


def _serve(rank: int, pipe, threads: int, backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A parent must be able to start and kill a rank before torch is imported.
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    while (job := pipe.recv()) is not None:
        module, name, args, options, size, store = job
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            XDG_CACHE_HOME=os.path.dirname(store),
        )
        try:
            function = _function(module, name)  # the import may register the world's backend
            dist.init_process_group(
                backend,
                store=dist.FileStore(store, size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=60),
            )
            torch.manual_seed(0)
            result = function(*args, **options)
            pipe.send((None, result))
            # Nobody leaves before all have arrived: gloo takes a peer that is gone for a failure,
            # even while it connects.
            pipe.recv()
        except BaseException as error:
            text = f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
            pipe.send((time.monotonic(), text))
            if dist.is_initialized():  # its peers then fail at once instead of waiting for it
                dist.destroy_process_group()
            pipe.recv()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_dtensor_plans()


class Pool:
    """Processes that take the part of ranks, started when a call needs them.

    Args:
        threads: the threads of each rank.
        backend: the backend of the world.
    """

    def __init__(self, threads: int = 1, backend: str = "gloo"):
        self.threads = threads
        self.backend = backend
        self.workers: list = []  # (process, pipe) of each rank
        self.folder = tempfile.TemporaryDirectory(prefix="tpkernels-test-")
        self.calls = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        self.close()
        self.folder.cleanup()

    def _start(self, size: int) -> None:
        context = mp.get_context("spawn")
        while len(self.workers) < size:
            here, there = context.Pipe()
            rank = len(self.workers)
            process = context.Process(
                target=_serve, args=(rank, there, self.threads, self.backend), daemon=True
            )
            process.start()
            there.close()
            self.workers.append((process, here))

    def _answer(self, rank: int) -> tuple[float | None, object]:
        """Return the time of a rank's failure, None without one, and its result or message."""
        process, pipe = self.workers[rank]
        try:
            return pipe.recv()
        except (EOFError, OSError):
            process.join(GRACE)
            return DIED, f"rank {rank} died, exit code {process.exitcode}"

    def run(
        self, size: int, function: Callable, *args, timeout: float = TIMEOUT, **options
    ) -> list:
        """Call a module's function on each rank of a fresh world.

        Returns:
            [function(*args, **options) on rank 0, on rank 1, ...].

        Raises:
            AssertionError: with the traceback of the first rank that raised, the rank that died,
                or the ranks that did not return in time.
        """
        self._start(size)
        self.calls += 1
        store = os.path.join(self.folder.name, f"store{self.calls}")
        job = function.__module__, function.__name__, args, options, size, store
        for _, pipe in self.workers[:size]:
            with contextlib.suppress(BrokenPipeError):  # a dead rank is found below
                pipe.send(job)
        results, failures = self._wait(size, timeout)
        if failures:
            raise AssertionError(min(failures)[1])
        return results

    def _wait(self, size: int, timeout: float) -> tuple[list, list[tuple[float, str]]]:
        """Return the ranks' results, and the time and message of each failure."""
        results: list = [None] * size
        failures: list = []
        deadline = time.monotonic() + timeout
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:size])}
        while waiting:
            ready = mp.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in map(waiting.pop, ready):
                failed, results[rank] = self._answer(rank)
                if failed is not None:
                    failures.append((failed, results[rank]))
                    deadline = min(deadline, time.monotonic() + GRACE)
        if waiting and not failures:
            ranks = sorted(waiting.values())
            text = f"ranks {ranks} of {size} did not return in {timeout} s: a hang"
            failures.append((time.monotonic(), text))
        if waiting or any(failed == DIED for failed, _ in failures):
            self.close()
        for _, pipe in self.workers[:size]:
            pipe.send("leave")
        return results, failures

    def close(self) -> None:
        """Kill the ranks; the next call starts others."""
        for process, pipe in self.workers:
            process.kill()
            process.join()
            with contextlib.suppress(OSError):
                pipe.close()
        self.workers = []
