"""Runs a function on n ranks: processes that stay alive between tests (importing torch costs seconds), a fresh world each time."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from datetime import timedelta

TIMEOUT = 240  # seconds a call may take, on a loaded machine


def _serve(rank: int, pipe, threads: int, backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    while (job := pipe.recv()) is not None:
        module, name, args, size, store = job
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(size),
            XDG_CACHE_HOME=os.path.dirname(store),
        )
        try:
            function = getattr(importlib.import_module(module), name)
            dist.init_process_group(
                backend,
                store=dist.FileStore(store, size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=60),
            )
            torch.manual_seed(0)
            pipe.send(("ok", function(*args)))
            pipe.recv()  # nobody leaves before all have arrived: gloo takes a peer that is gone for a failure, even while connecting
        except BaseException as error:
            if dist.is_initialized():  # its peers then fail at once instead of waiting for it
                dist.destroy_process_group()
            pipe.send(
                ("error", f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
            )
            pipe.recv()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Pool:
    def __init__(self, threads: int = 1, backend: str = "gloo"):
        self.threads, self.backend, self.workers = threads, backend, []
        self.folder = tempfile.TemporaryDirectory(prefix="tpkernels-test-")
        self.calls = 0

    def _start(self, size: int) -> None:
        context = mp.get_context("spawn")
        while len(self.workers) < size:
            here, there = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(len(self.workers), there, self.threads, self.backend),
                daemon=True,
            )
            process.start()
            there.close()
            self.workers.append((process, here))

    def run(self, size: int, function, *args, timeout: float = TIMEOUT) -> list:
        """[function(*args) on rank 0, on rank 1, ...]; the first rank's error is raised with its traceback."""
        self._start(size)
        self.calls += 1
        store = os.path.join(self.folder.name, f"store{self.calls}")
        for _, pipe in self.workers[:size]:
            pipe.send((function.__module__, function.__name__, args, size, store))
        deadline, results, failure = time.monotonic() + timeout, [None] * size, None
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:size])}
        while waiting:
            ready = mp.connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    status, results[rank] = pipe.recv()
                except EOFError:
                    status, results[rank] = "error", f"rank {rank} died"
                if status == "error" and failure is None:
                    failure = results[rank]
                    deadline = time.monotonic() + 10  # its peers may wait for it in a collective
        if waiting:
            self.close()
            failure = (
                failure
                or f"ranks {sorted(waiting.values())} of {size} did not return in {timeout} s: a hang"
            )
        for _, pipe in self.workers[:size]:
            pipe.send("leave")
        if failure:
            raise AssertionError(failure)
        return results

    def close(self) -> None:
        for process, pipe in self.workers:
            process.kill()
            process.join()
            with contextlib.suppress(OSError):
                pipe.close()
        self.workers = []
