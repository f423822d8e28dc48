"""OpenMPI's all-reduce on one host, by mpi4py: its sm transport with process_vm_readv (CMA)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import plain
from .registry import cpu_only


def unavailable() -> str | None:
    return cpu_only("OpenMPI")


class Peer(plain.Peer):
    dtypes = (torch.float32,)  # MPI has no bfloat16

    def __init__(self, world):
        super().__init__(world)
        from mpi4py import MPI  # importing it starts MPI

        self.mpi = MPI
        if MPI.COMM_WORLD.Get_size() != world.size:
            raise RuntimeError("the ranks were not started by mpirun")

    def all_reduce(self, tensor: Tensor) -> None:
        self.mpi.COMM_WORLD.Allreduce(self.mpi.IN_PLACE, [tensor.numpy(), self.mpi.FLOAT])
