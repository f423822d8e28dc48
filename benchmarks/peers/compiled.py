"""torch.compile of the plain layers; one graph serves all token counts of a dtype."""

from __future__ import annotations

import shutil

import stock
import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor, nn

from . import plain


def unavailable() -> str | None:
    if shutil.which("g++") or torch.cuda.is_available():
        return None
    return "torch.compile on CPUs needs g++"


class Peer(plain.Peer):
    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(collectives.all_reduce(tensor, "sum", torch.distributed.group.WORLD))

    def mlp(self, mlp: stock.MLP) -> nn.Module:
        return torch.compile(super().mlp(mlp), dynamic=True)

    def block(self, block: stock.Block) -> nn.Module:
        return torch.compile(super().block(block), dynamic=True)
