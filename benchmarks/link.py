"""Two ranks in network namespaces of their own, joined by a veth pair whose rate is limited: a real, slow link on one machine.

The namespaces belong to the ranks' processes: however those end, nothing is left behind. Needs root, and `ip`, `tc` and `nsenter`.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import shutil
import subprocess
import tempfile
import traceback

CLONE_NEWNET = 0x40000000
DEVICE = "veth0"  # in either namespace
TIMEOUT = 300  # seconds that a call may take


def missing() -> str:
    """What this machine lacks for a `Link`; empty if nothing."""
    tools = [tool for tool in ("ip", "tc", "nsenter") if shutil.which(tool) is None]
    if tools:
        return f"needs {' and '.join(tools)} (iproute2 and util-linux)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if ctypes.CDLL(None).unshare(0) != 0:
        return "needs unshare(), which is not allowed here"
    return ""


def _serve(rank: int, pipe, store: str) -> None:
    if (
        ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0
    ):  # before any thread: each has its own namespace
        pipe.send(
            ("error", f"rank {rank}: no network namespace: {os.strerror(ctypes.get_errno())}")
        )
        return
    pipe.send(("ok", None))
    if pipe.recv() is None:  # the link is there
        return
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    import torch
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
    """link.run(function, *args): [what it returned on rank 0, on rank 1], one core and one thread each, gloo over the link."""

    def __enter__(self) -> Link:
        self.folder = tempfile.TemporaryDirectory(prefix="tpkernels-link-")
        context, self.ranks = mp.get_context("spawn"), []
        try:
            for rank in range(2):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve,
                    args=(rank, there, os.path.join(self.folder.name, "store")),
                    daemon=True,
                )
                process.start()
                there.close()
                self.ranks.append((process, here))
            self._results()
            a, b = (str(process.pid) for process, _ in self.ranks)
            self._command(
                "ip",
                "link",
                "add",
                DEVICE,
                "netns",
                a,
                "type",
                "veth",
                "peer",
                "name",
                DEVICE,
                "netns",
                b,
            )
            for rank in range(2):
                self._inside(rank, "ip", "addr", "add", f"10.0.0.{rank + 1}/24", "dev", DEVICE)
                for device in ("lo", DEVICE):
                    self._inside(rank, "ip", "link", "set", device, "up")
            for _, pipe in self.ranks:
                pipe.send("start")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        for process, pipe in self.ranks:
            process.kill()
            process.join()
            pipe.close()
        self.folder.cleanup()

    def set_rate(self, gbit: float) -> None:
        for rank in range(2):
            rate = ("rate", f"{gbit}gbit", "burst", "512kb", "latency", "100ms")
            self._inside(rank, "tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf", *rate)

    def run(self, function, *args) -> list:
        for _, pipe in self.ranks:
            pipe.send((function, args))
        return self._results()

    def _results(self) -> list:
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

    def _inside(self, rank: int, *command: str) -> None:
        self._command("nsenter", "--net", "--target", str(self.ranks[rank][0].pid), *command)

    @staticmethod
    def _command(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
