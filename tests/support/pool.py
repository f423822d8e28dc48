"""Run functions and tests on ranks: processes that stay alive, and a fresh world for each call.

The processes stay alive because importing torch costs seconds. The pool and a process speak in
turns, and every message bears the number of its call:

    pool                process
    (call, job)
                        (call, answer)   its function has returned or raised
    (call, LEAVE)
                        (call, LEFT)     its world is gone; or BROKEN: it must make no other

Nobody leaves before all have answered: gloo takes a peer that is gone for a failure, even while
it connects. The pool kills a process that breaks off the conversation, and starts another for the
next call.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import inspect
import multiprocessing as mp
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path

import pytest

TIMEOUT = 240  # seconds that a call may take on a loaded machine
LEAVE, LEFT, BROKEN = b"leave", b"left", b"broken"
DIED, RAISED, HUNG = range(3)  # a death explains the errors, and an error explains the hangs


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


def _leave_world() -> None:
    # A parent must be able to start and kill a rank before torch is imported.
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if "torch.distributed.tensor" in sys.modules:  # its cache names groups that are gone
        debug = importlib.import_module("torch.distributed.tensor.debug")
        debug._clear_sharding_prop_cache()


def _answer(rank: int, backend: str, job: bytes) -> tuple[float | None, bytes]:
    """Return the time of a failure and its text, or None and the pickled result."""
    import torch
    import torch.distributed as dist

    try:
        module, name, args, options, size, store = pickle.loads(job)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            XDG_CACHE_HOME=os.path.dirname(store),
        )
        function = _function(module, name)  # the import may register the world's backend
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, size),  # a TCPStore looks up the names of its peers
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=60),
        )
        torch.manual_seed(0)
        # Tensors are sent by value. In torch's own way they would stay in the memory of a process
        # that may die.
        return None, pickle.dumps(function(*args, **options))
    except BaseException as error:
        text = f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"
        return time.monotonic(), text.encode(errors="backslashreplace")


def _serve(rank: int, pipe, stderr: str, threads: int, backend: str) -> None:
    os.setsid()  # the pool kills what the rank has forked, too
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the pool
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    faulthandler.enable()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    process = os.getpid()
    with contextlib.suppress(EOFError):  # the pool is gone
        while True:
            call, job = pipe.recv()
            os.ftruncate(2, 0)
            failed, answer = _answer(rank, backend, job)
            if os.getpid() != process:
                os._exit(1)  # a fork of the rank, which has no part in the conversation
            pipe.send((call, failed, answer))
            # A world that was not made leaves its number behind, which the next one's name has.
            last_word = LEFT if dist.is_initialized() or not failed else BROKEN
            if failed:
                _leave_world()  # its peers then fail at once instead of waiting for it
            assert pipe.recv() == (call, LEAVE)
            _leave_world()
            pipe.send((call, None, last_word))


class RanksFailed(AssertionError):
    """The first failure in full and a line of each other; `results` has those of the ranks."""

    def __init__(self, texts: list[str], results: list):
        lines = [f"then {text.splitlines()[0]}" for text in texts[1:]]
        super().__init__("\n".join([texts[0].rstrip(), *lines]))
        self.results = results


class Worker:
    """The pool's side of the process of one rank."""

    def __init__(self, context, rank: int, folder: str, *arguments):
        self.rank = rank
        self.busy = self.killed = False
        descriptor, self.stderr = tempfile.mkstemp(dir=folder, prefix=f"stderr-of-rank-{rank}-")
        os.close(descriptor)
        self.pipe, there = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(rank, there, self.stderr, *arguments), daemon=True
        )
        self.process.start()
        there.close()
        # It tells the end of the process, where a fork may have inherited the end of the pipe.
        self.ended = os.pidfd_open(self.process.pid)

    def send(self, *message) -> None:
        self.busy = True
        with contextlib.suppress(OSError):  # a death is found where its answer is awaited
            self.pipe.send(message)

    def receive(self) -> tuple | None:
        """Return the message that has come, or None if the process is dead or dying."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll():
                return self.pipe.recv()
        return None

    def has_ended(self, seconds: float = 0) -> bool:
        return bool(connection.wait([self.ended], seconds))

    def death(self, when: str = "", seconds: float = 10) -> str:
        """Return how a dying process has died, and its last words."""
        self.has_ended(seconds)
        self.kill()
        code = self.process.exitcode
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"rank {self.rank} died ({how}){when}\n{self.words()}"

    def words(self) -> str:
        """Return the end of what the rank has written to stderr in this call."""
        return Path(self.stderr).read_text(errors="replace")[-8000:]

    def kill(self) -> None:
        """Kill the process and all that it has forked."""
        if self.killed:
            return  # its number may be another's by now
        self.killed = True
        self.process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()

    def close(self) -> None:
        self.kill()
        self.pipe.close()
        os.close(self.ended)
        os.unlink(self.stderr)


class Pool:
    """Processes that take the part of ranks, started when a call needs them.

    Args:
        threads: the threads of each rank.
        backend: the backend of the world.
        start: "spawn", or "forkserver" where many ranks die: all but the first start at once, but
            one seed serves the hashes of all.
        grace: the seconds that the other ranks have once one has failed, as they may wait for it.
    """

    def __init__(
        self, threads: int = 1, backend: str = "gloo", start: str = "spawn", grace: float = 10
    ):
        self.threads = threads
        self.backend = backend
        self.grace = grace
        self.context = mp.get_context(start)
        if start == "forkserver":
            slow = ["pytest", "tpkernels", "torch.distributed.tensor.debug"]
            self.context.set_forkserver_preload(slow)
        self.workers: dict[int, Worker] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="tpkernels-test-")
        self.calls = 0
        self.last_function = ""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        try:
            self._check_idle()
        finally:
            self.close()
            self.folder.cleanup()

    def run(
        self, size: int, function: Callable, *args, timeout: float = TIMEOUT, **options
    ) -> list:
        """Call a module's function on each rank of a fresh world.

        Returns:
            [function(*args, **options) on rank 0, on rank 1, ...].

        Raises:
            RanksFailed: with the last words of the rank that died, the traceback of the first
                rank that raised, or the stacks of the ranks that did not return in time.
        """
        self._check_idle()
        self.calls += 1
        self.last_function = function.__name__
        store = os.path.join(self.folder.name, f"store{self.calls}")
        job = pickle.dumps((function.__module__, function.__name__, args, options, size, store))
        for rank in range(size):
            if rank not in self.workers:
                self.workers[rank] = self._start(rank)
        workers = [self.workers[rank] for rank in range(size)]
        results: list = [None] * size
        try:
            answers, failures = self._exchange(workers, job, timeout)
            for worker, (failed, answer) in answers.items():
                try:
                    results[worker.rank] = None if failed else pickle.loads(answer)
                except Exception as error:
                    failures.append(f"rank {worker.rank}: its result cannot be read: {error!r}")
            left, more = self._exchange(list(answers), LEAVE, self.grace if failures else timeout)
            for worker, (_, last_word) in left.items():
                worker.busy = last_word != LEFT
        finally:  # even where Ctrl-C or pytest's timeout ends the call
            self._drop([worker for worker in workers if worker.busy])
            Path(store).unlink(missing_ok=True)
        if failures + more:
            raise RanksFailed(failures + more, results)
        return results

    def _start(self, rank: int) -> Worker:
        return Worker(self.context, rank, self.folder.name, self.threads, self.backend)

    def _exchange(
        self, workers: list[Worker], message: bytes, timeout: float
    ) -> tuple[dict[Worker, tuple], list[str]]:
        """Send the message to all workers and return their replies, and the failures in order."""
        replies: dict = {}
        failures: list = []  # (DIED, RAISED or HUNG, its time, its text)
        deadline = time.monotonic() + timeout
        for worker in workers:
            worker.send(self.calls, message)
        waiting = set(workers)
        while waiting:
            owners = {end: worker for worker in waiting for end in (worker.pipe, worker.ended)}
            ready = connection.wait(list(owners), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for worker in {owners[end] for end in ready}:
                waiting.remove(worker)
                reply = worker.receive()
                if reply is None:
                    failures.append((DIED, time.monotonic(), worker.death()))
                    continue
                call, failed, answer = reply
                assert call == self.calls, f"rank {worker.rank} is out of step: {reply}"
                replies[worker] = failed, answer
                if failed:
                    failures.append((RAISED, failed, answer.decode() + worker.words()))
            if failures:
                deadline = min(deadline, time.monotonic() + self.grace)
        if waiting:
            seconds = self.grace if failures else timeout
            failures.append((HUNG, deadline, self._describe_hang(waiting, len(workers), seconds)))
        return replies, [text for *_, text in sorted(failures)]

    def _describe_hang(self, hung: set[Worker], size: int, seconds: float) -> str:
        for worker in hung:  # faulthandler then writes the stacks of its threads
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.process.pid, signal.SIGABRT)
        ranks = sorted(worker.rank for worker in hung)
        words = "\n".join(worker.death(seconds=5) for worker in hung)
        return f"ranks {ranks} of {size} did not return in {seconds:g} s: a hang\n{words}"

    def _check_idle(self) -> None:
        """Raise if a process has died since the last call, which may have been its cause."""
        died = [worker for worker in self.workers.values() if worker.has_ended()]
        texts = [worker.death(f" after {self.last_function} had returned") for worker in died]
        self._drop(died)
        if texts:
            raise RanksFailed(texts, [])

    def _drop(self, workers: list[Worker]) -> None:
        for worker in workers:
            self.workers.pop(worker.rank).close()

    def close(self) -> None:
        """Kill the ranks; the next call starts others."""
        self._drop(list(self.workers.values()))
