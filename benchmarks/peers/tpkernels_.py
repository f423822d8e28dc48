"""tpkernels, over the transport that init_mesh takes."""

from __future__ import annotations

from typing import Any

import stock
import torch
from torch import Tensor, nn

import tpkernels as tpk

from . import plain

RENAMED = {
    "norm1": "attention_norm",
    "norm2": "mlp_norm",
    "out": "attention.o_proj",
    "mlp": "mlp",
}  # stock.Block's modules, as ParallelTransformerBlock names them


def unavailable() -> str | None:
    return None


def _place(full: nn.Module) -> dict:
    """Returns the device and dtype of a module, as a layer's constructor takes them."""
    parameter = next(full.parameters())
    return dict(device=parameter.device, dtype=parameter.dtype)


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        self.mesh = tpk.init_mesh(world.size, device=world.device)
        self.group = self.mesh.get_group("tp")
        backend = "gloo" if world.device == "cpu" else "cpu:gloo,cuda:nccl"
        self.alone = torch.distributed.new_subgroups(1, backend=backend)[0]

    def all_reduce(self, tensor: Tensor) -> None:
        tpk.all_reduce_(tensor, self.group)

    def column(self, linear: nn.Linear, overlap: str | bool | int = "auto") -> nn.Module:
        layer = tpk.nn.ColumnParallelLinear
        return layer.from_linear(linear, group=self.mesh["tp"], overlap=overlap)

    def row(self, linear: nn.Linear, overlap: str | bool | int = "auto") -> nn.Module:
        layer = tpk.nn.RowParallelLinear
        return layer.from_linear(linear, group=self.mesh["tp"], overlap=overlap)

    def mlp(self, mlp: stock.MLP, overlap: str | bool | int = "auto") -> nn.Module:
        options: dict[str, Any] = dict(group=self.mesh["tp"], overlap=overlap, **_place(mlp))
        new = tpk.nn.ParallelMLP(mlp.fc1.in_features, mlp.fc1.out_features, **options)
        tpk.load_unsharded_state_dict(new, mlp.state_dict())
        return new

    def block(self, block: stock.Block, overlap: str | bool | int = "auto") -> nn.Module:
        options: dict[str, Any] = dict(group=self.mesh["tp"], overlap=overlap, **_place(block))
        new = tpk.nn.ParallelTransformerBlock(block.out.in_features, block.heads, **options)
        state = {}
        for name, tensor in block.state_dict().items():
            module, _, rest = name.partition(".")
            if module == "qkv":
                for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                    state[f"attention.{projection}_proj.{rest}"] = part
            else:
                state[f"{RENAMED[module]}.{rest}"] = tensor
        tpk.load_unsharded_state_dict(new, state)
        return new

    def gemms(self, kind: str, full: nn.Module) -> nn.Module:
        """Returns this rank's share of `full` in a group of one: its GEMMs, no communication.

        Its weights are random: only its time is of use.
        """
        options: dict[str, Any] = dict(group=self.alone, **_place(full))
        if kind == "row":
            k, n = full.in_features // self.size, full.out_features
            return tpk.nn.RowParallelLinear(k, n, **options)
        if kind == "column":
            k, n = full.in_features, full.out_features // self.size
            return tpk.nn.ColumnParallelLinear(k, n, **options)
        if kind == "mlp":
            hidden, ffn = full.fc1.in_features, full.fc1.out_features // self.size
            return tpk.nn.ParallelMLP(hidden, ffn, **options)
        hidden, heads = full.out.in_features, full.heads
        new = tpk.nn.ParallelTransformerBlock(hidden, heads, **options)
        new.attention = tpk.nn.ParallelSelfAttention(
            hidden, heads // self.size, head_dim=hidden // heads, **options
        )
        ffn = full.mlp.fc1.out_features // self.size
        new.mlp = tpk.nn.ParallelMLP(hidden, ffn, **options)
        return new
