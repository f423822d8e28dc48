"""torch.compile of the plain layers; a graph for all token counts of a dtype."""

from __future__ import annotations

import shutil

import torch
import torch.distributed._functional_collectives as collectives
from torch import nn

from . import plain


def unavailable() -> str | None:
    return (
        None
        if shutil.which("g++") or torch.cuda.is_available()
        else "torch.compile on CPUs needs g++"
    )


class Peer(plain.Peer):
    def all_reduce(self, tensor) -> None:
        tensor.copy_(collectives.all_reduce(tensor, "sum", torch.distributed.group.WORLD))

    def mlp(self, mlp) -> nn.Module:
        return torch.compile(super().mlp(mlp), dynamic=True)

    def block(self, block) -> nn.Module:
        return torch.compile(super().block(block), dynamic=True)
