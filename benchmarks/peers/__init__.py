"""The systems measured beside tpkernels, an adapter each. One that cannot run here says why; nothing else is lost with it."""

from __future__ import annotations

import importlib
import importlib.util

import torch

# Names are what the tables and pictures say; a peer's module is imported only in the ranks, when it is to run.
MODULES = {
    "tpkernels": "tpkernels_",
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
SLOW_TO_START = {*PACKAGES, "SGLang", "torch.compile", "DTensor"}  # what a smoke run leaves out


def unavailable(name: str) -> str | None:
    """Why this peer cannot run here, or None. Imports nothing heavy."""
    package = PACKAGES.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{name} is not installed: `make bench` installs what requirements-bench.txt names"
    return importlib.import_module(f"peers.{MODULES[name]}").unavailable()


def start(world, names: list[str]) -> tuple[dict, dict[str, str]]:
    """({name: Peer}, {name: why not}) of those named, in this process. A failure of one rank's is a failure of all."""
    import torch.distributed as dist

    peers, absent = {}, {}
    for name in names:
        try:
            peer, why = importlib.import_module(f"peers.{MODULES[name]}").Peer(world), None
        except Exception as error:
            peer, why = (
                None,
                f"{name} did not start: {type(error).__name__}: {error}".splitlines()[0],
            )
        whys = [None] * world.size
        dist.all_gather_object(whys, why, group=world.group)
        failed = next((other for other in whys if other), None)
        if failed:
            absent[name] = failed
        else:
            peers[name] = peer
    return peers, absent


def cpu_only(name: str) -> str | None:
    return (
        f"{name}'s all-reduce over shared memory is for CPUs" if torch.cuda.is_available() else None
    )
