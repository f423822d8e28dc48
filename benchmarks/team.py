"""The ranks that measure: a process and a core for each, one world for all cases of its size.

The pytest process only coordinates. If OpenMPI is installed, mpirun starts the ranks, so that MPI
can be one of the contenders in them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PR_SET_PDEATHSIG = 1
START_TIMEOUT, CASE_TIMEOUT, GRACE = 120, 300, 10  # seconds

# The wheel's mpirun needs these on one host: no remote shell, no pinning (World pins), and leave
# to start more ranks than there are cores.
MPIRUN_OPTIONS = "--bind-to none --oversubscribe --mca pml ob1 --mca btl self,sm --mca smsc cma"


class Team:
    """`size` ranks. A failure ends its processes: start another.

    Args:
        size: number of ranks.
        peers: names of the peers to start in each rank.
        checkout: folder whose tpkernels is measured; this checkout by default.
    """

    def __init__(self, size: int, peers: list[str], checkout: Path = HERE.parent):
        self.size = size
        self.folder = tempfile.TemporaryDirectory(prefix="tpkernels-bench-")
        folder = Path(self.folder.name)  # readable by its user only
        self.processes: list[subprocess.Popen] = []
        self.pipes: dict[int, Connection] = {}
        command = [sys.executable, str(HERE / "team.py"), str(folder), str(size), ",".join(peers)]
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(folder / "socket"))
            listener.listen(size)
            listener.settimeout(1)
            self._start(command, self._environment(checkout), "OpenMPI" in peers)
            self._connect(listener)
        except BaseException:
            self.close()
            raise
        finally:
            listener.close()

    def _environment(self, checkout: Path) -> dict[str, str]:
        paths = [str(HERE), str(checkout), os.environ.get("PYTHONPATH", "")]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": str(self.size),
            "LOCAL_SIZE": str(self.size),  # DeepSpeed's name for it
            # The rendezvous is a file. vLLM and DeepSpeed name their segments after these two.
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(os.getpid()),
        }

    def _start(self, command: list[str], environment: dict[str, str], mpi: bool) -> None:
        mpirun = shutil.which("mpirun", path=os.path.dirname(sys.executable)) if mpi else None
        if mpirun is None:
            starts = [(command, {"RANK": str(rank)}) for rank in range(self.size)]
        else:
            options = MPIRUN_OPTIONS.split()
            if os.geteuid() == 0:
                options.append("--allow-run-as-root")
            starts = [([mpirun, "-n", str(self.size), *options, *command], {})]
        with open(Path(self.folder.name, "log"), "w") as log:
            for start, more in starts:
                process = subprocess.Popen(
                    start,
                    env=environment | more,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder.name,
                    start_new_session=True,
                )
                self.processes.append(process)

    def _connect(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while len(self.pipes) < self.size:
            with contextlib.suppress(TimeoutError):
                pipe = Connection(listener.accept()[0].detach())
                self.pipes[pipe.recv()] = pipe
                continue
            if time.monotonic() > deadline or not self.alive:
                raise RuntimeError(f"{self.size} ranks did not start:\n{self._log()}")

    def run(self, module: str, function: str, *args, timeout: float = CASE_TIMEOUT) -> list[Any]:
        """Calls `function(world, *args)` of a module on every rank; returns the results by rank.

        Raises:
            RuntimeError: a rank failed (its traceback), died, or took over `timeout` seconds.
        """
        try:
            for pipe in self.pipes.values():
                pipe.send((module, function, args))
            results, failure = self._collect(timeout)
        except BaseException:
            self.close()
            raise
        if failure is not None:
            self.close()
            raise RuntimeError(failure)
        return [results[rank] for rank in range(self.size)]

    def _collect(self, timeout: float) -> tuple[dict[int, Any], str | None]:
        """Returns the results by rank, and the first failure."""
        results: dict[int, Any] = {}
        failure: str | None = None
        waiting = {pipe: rank for rank, pipe in self.pipes.items()}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, results[rank] = pipe.recv()
                except EOFError:
                    ok, results[rank] = False, f"rank {rank} died:\n{self._log()}"
                if not ok and failure is None:
                    failure = results[rank]
                    deadline = time.monotonic() + GRACE  # its peers may wait for it
        if waiting and failure is None:
            ranks = f"ranks {sorted(waiting.values())} of {self.size}"
            failure = f"{ranks} did not return in {timeout} s:\n{self._log()}"
        return results, failure

    def _log(self) -> str:
        with contextlib.suppress(OSError):
            return Path(self.folder.name, "log").read_text()[-4000:]
        return ""

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        for pipe in self.pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                # Its own session: mpirun's children end with it.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for pipe in self.pipes.values():
            pipe.close()
        self.pipes = {}
        self.folder.cleanup()


class World:
    """A rank's view of the team.

    Attributes:
        rank, size, device: of this rank ("cpu" or "cuda").
        cores: the cores of this machine that the team may use.
        peers: the peers that run here, by name.
        absent: why each of the others does not, by name.
    """

    def __init__(self, rank: int, size: int, store: str, peers: list[str]):
        import torch  # the coordinator, which imports this module too, does without
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.cores = os.sched_getaffinity(0)
        if self.device == "cpu":
            # Before any thread is started: threads inherit it.
            os.sched_setaffinity(0, {sorted(self.cores)[rank % len(self.cores)]})
        else:
            torch.cuda.set_device(rank)
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=CASE_TIMEOUT),
        )
        # Its barrier sleeps while it waits, so that a rank that is late has the core to itself.
        self.group = dist.new_group(backend="gloo")
        from peers import registry  # a peer imports torch

        self.peers: dict[str, Any] = {}
        self.absent: dict[str, str] = {}
        registry.start(self, peers)
        self._kept_for, self._kept = None, {}
        gc.collect()
        # Else every collection before a memory figure walks the packages' objects, 0.1 s each time.
        gc.freeze()

    def barrier(self) -> None:
        import torch.distributed as dist  # as above

        dist.barrier(self.group)

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's `value` on every rank."""
        import torch.distributed as dist  # as above

        box = [value]
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def keep(self, key: Any, make: Callable[[], dict]) -> dict:
        """Returns make()'s result, and keeps it until another key is asked for."""
        if key != self._kept_for:
            self._kept_for, self._kept = None, {}  # freed before the next is made
            self._kept = make()
            self._kept_for = key
        return self._kept


def serve(pipe: Connection, rank: int, size: int, folder: str, peers: list[str]) -> World | None:
    """Runs the coordinator's jobs until it sends None or is gone."""
    world = None
    with contextlib.suppress(EOFError):
        while (job := pipe.recv()) is not None:
            module, function, args = job
            try:
                world = world or World(rank, size, f"{folder}/store", peers)
                result = getattr(importlib.import_module(module), function)(world, *args)
                pipe.send((True, result))
            except BaseException:
                pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
    return world


def main(folder: str, size: str, peers: str) -> None:
    # The rank ends with the coordinator, or mpirun, however that ends.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    rank = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{folder}/socket")
    pipe = Connection(connection.detach())
    pipe.send(rank)
    world = serve(pipe, rank, int(size), folder, list(filter(None, peers.split(","))))
    if world is not None and "OpenMPI" in world.peers:
        world.peers["OpenMPI"].mpi.Finalize()  # removes its segments
    os._exit(0)  # peers' atexit handlers may wait for ranks that are gone


if __name__ == "__main__":
    sys.modules["team"] = sys.modules["__main__"]
    main(*sys.argv[1:])
