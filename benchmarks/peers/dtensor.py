"""PyTorch's own tensor parallelism: ColwiseParallel and RowwiseParallel on DTensor parameters."""

from __future__ import annotations

import copy

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from . import plain


def unavailable() -> str | None:
    return None


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        self.mesh = init_device_mesh(world.device, (world.size,))

    def column(self, linear: nn.Linear) -> nn.Module:
        style = ColwiseParallel(input_layouts=Replicate())
        return parallelize_module(copy.deepcopy(linear), self.mesh, style)

    def row(self, linear: nn.Linear) -> nn.Module:
        style = RowwiseParallel(input_layouts=Shard(-1))
        return parallelize_module(copy.deepcopy(linear), self.mesh, style)
