"""Names of the peers, why one cannot run here, and how those that can are started.

A peer that cannot run says why; the others are measured without it.
"""

from __future__ import annotations

import importlib
import importlib.util

OUR_ALL_REDUCE = "plain + our all-reduce"
OUR_GEMM = "plain + our GEMM and all-reduce"

# The tables and pictures show these names. Only the ranks import a peer's module.
MODULES = {
    "tpkernels": "tpkernels_",
    OUR_ALL_REDUCE: "our_all_reduce",
    OUR_GEMM: "our_gemm",
    "torch": "plain",
    "torch.compile": "compiled",
    "DTensor": "dtensor",
    "megatron-core": "megatron",
    "fairscale": "fairscale_",
    "vLLM": "vllm_",
    "SGLang": "sglang_",
    "DeepSpeed": "deepspeed_",
    "OpenMPI": "openmpi",
}
PACKAGES = {
    "megatron-core": "megatron",
    "fairscale": "fairscale",
    "vLLM": "vllm",
    "DeepSpeed": "deepspeed",
    "OpenMPI": "mpi4py",
}
SLOW_TO_START = {*PACKAGES, "SGLang", "torch.compile", "DTensor"}  # a smoke run leaves them out


def unavailable(name: str) -> str | None:
    """Returns why this peer cannot run here, or None. Imports nothing heavy."""
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{name} is not installed: `make bench` installs what requirements-bench.txt names"
    return importlib.import_module(f"peers.{MODULES[name]}").unavailable()


def start(world, names: list[str]) -> None:
    """Starts the named peers in this process: into world.peers, or world.absent with the reason.

    A peer that fails on one rank is absent on all.

    Collective: every rank must call it.
    """
    import torch.distributed as dist  # deferred: plot.py needs the names alone

    for name in names:
        peer, reason = None, None
        try:
            peer = importlib.import_module(f"peers.{MODULES[name]}").Peer(world)
        except Exception as error:
            reason = f"{name} did not start: {type(error).__name__}: {error}".splitlines()[0]
        reasons = [None] * world.size
        dist.all_gather_object(reasons, reason, group=world.group)
        failures = [other for other in reasons if other]
        if failures:
            world.absent[name] = failures[0]
        else:
            world.peers[name] = peer


def cpu_only(name: str) -> str | None:
    import torch  # deferred: plot.py needs the names alone

    if torch.cuda.is_available():
        return f"{name}'s all-reduce over shared memory is for CPUs"
    return None
