"""OpenMPI's all-reduce between processes of one host: its sm transport with CMA (process_vm_readv), through mpi4py."""

from __future__ import annotations

import torch

from . import cpu_only, plain


def unavailable() -> str | None:
    return cpu_only("OpenMPI")


class Peer(plain.Peer):
    dtypes = (torch.float32,)  # MPI has no bfloat16

    def __init__(self, world):
        super().__init__(world)
        from mpi4py import MPI

        self.mpi = MPI
        if MPI.COMM_WORLD.Get_size() != world.size:
            raise RuntimeError("the ranks were not started by mpirun")

    def all_reduce(self, tensor) -> None:
        self.mpi.COMM_WORLD.Allreduce(self.mpi.IN_PLACE, [tensor.numpy(), self.mpi.FLOAT])
