"""Two ranks in network namespaces, joined by a veth pair of limited rate: a slow link for real.

The namespaces belong to the ranks' processes: however those end, nothing is left behind. Needs
root, and `ip`, `tc` and `nsenter`.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

CLONE_NEWNET = 0x40000000
DEVICE = "veth0"  # in either namespace
TIMEOUT = 300  # seconds that a call may take


def missing() -> str:
    """Returns why a `Link` cannot run on this machine; empty if it can."""
    tools = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if tools:
        return f"needs {' and '.join(tools)} (iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if ctypes.CDLL(None).unshare(0) != 0:
        return "needs unshare(), which is not allowed here"
    return ""


def _serve(rank: int, pipe, store: str) -> None:
    # Before any thread is started: each thread has a namespace of its own.
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        reason = os.strerror(ctypes.get_errno())
        pipe.send(("error", f"rank {rank}: no network namespace: {reason}"))
        return
    pipe.send(("ok", None))
    if pipe.recv() is None:  # anything else: the link is up
        return
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    import torch  # deferred: it starts threads
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send(("ok", function(*args)))
        except BaseException:
            pipe.send(("error", f"rank {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()


class Link:
    """Two ranks with one core and one thread each, whose gloo goes over the link.

    `with Link() as link: link.run(function, *args)` returns the function's results, by rank.
    """

    def __enter__(self) -> Link:
        self.folder = tempfile.TemporaryDirectory(prefix="tpkernels-link-")
        self.ranks: list[tuple[Any, Any]] = []  # (process, pipe)
        context = mp.get_context("spawn")
        store = os.path.join(self.folder.name, "store")
        try:
            for rank in range(2):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(rank, there, store), daemon=True)
                process.start()
                there.close()
                self.ranks.append((process, here))
            self._results()
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self) -> None:
        """Makes the veth pair between the two namespaces and tells the ranks to go on."""
        a, b = (str(process.pid) for process, _ in self.ranks)
        peer = f"netns {a} type veth peer name {DEVICE} netns {b}"
        self._command(*f"ip link add {DEVICE} {peer}".split())
        for rank in range(2):
            self._inside(rank, f"ip addr add 10.0.0.{rank + 1}/24 dev {DEVICE}")
            for device in ("lo", DEVICE):
                self._inside(rank, f"ip link set {device} up")
        for _, pipe in self.ranks:
            pipe.send("start")

    def __exit__(self, *error) -> None:
        for process, pipe in self.ranks:
            process.kill()
            process.join()
            pipe.close()
        self.folder.cleanup()

    def set_rate(self, gbit: float) -> None:
        """Limits the link to `gbit` Gbit/s in either direction."""
        rate = f"tbf rate {gbit}gbit burst 512kb latency 100ms"
        for rank in range(2):
            self._inside(rank, f"tc qdisc replace dev {DEVICE} root {rate}")

    def run(self, function: Callable, *args) -> list[Any]:
        for _, pipe in self.ranks:
            pipe.send((function, args))
        return self._results()

    def _results(self) -> list[Any]:
        results = []
        for rank, (_, pipe) in enumerate(self.ranks):
            if not pipe.poll(TIMEOUT):
                raise TimeoutError(f"rank {rank} did not return in {TIMEOUT} s")
            try:
                status, result = pipe.recv()
            except EOFError:
                status, result = "error", f"rank {rank} died"
            if status == "error":
                raise RuntimeError(result)
            results.append(result)
        return results

    def _inside(self, rank: int, command: str) -> None:
        """Runs a command in a rank's namespace."""
        pid = str(self.ranks[rank][0].pid)
        self._command("nsenter", "--net", "--target", pid, *command.split())

    @staticmethod
    def _command(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
