"""tpkernels, over whatever transport init_mesh takes."""

from __future__ import annotations

import stock
import torch
from torch import nn

import tpkernels as tpk

from . import plain


def unavailable() -> str | None:
    return None


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        self.device = world.device
        self.mesh = tpk.init_mesh(world.size, device=world.device)
        self.group = self.mesh.get_group("tp")
        self.alone = torch.distributed.new_subgroups(
            1, backend="gloo" if world.device == "cpu" else "cpu:gloo,cuda:nccl"
        )[0]

    def all_reduce(self, tensor) -> None:
        tpk.all_reduce_(tensor, self.group)

    def column(self, linear: nn.Linear, overlap="auto") -> nn.Module:
        return tpk.nn.ColumnParallelLinear.from_linear(
            linear, group=self.mesh["tp"], overlap=overlap
        )

    def row(self, linear: nn.Linear, overlap="auto") -> nn.Module:
        return tpk.nn.RowParallelLinear.from_linear(linear, group=self.mesh["tp"], overlap=overlap)

    def mlp(self, mlp: stock.MLP, overlap="auto", group=None) -> nn.Module:
        group = group if group is not None else self.mesh["tp"]
        place = dict(device=mlp.fc1.weight.device, dtype=mlp.fc1.weight.dtype)
        new = tpk.nn.ParallelMLP(
            mlp.fc1.in_features, mlp.fc1.out_features, group=group, overlap=overlap, **place
        )
        tpk.load_unsharded_state_dict(new, mlp.state_dict())
        return new

    def block(self, block: stock.Block, overlap="auto") -> nn.Module:
        hidden = block.out.in_features
        place = dict(device=block.out.weight.device, dtype=block.out.weight.dtype)
        new = tpk.nn.ParallelTransformerBlock(
            hidden, block.heads, group=self.mesh["tp"], overlap=overlap, **place
        )
        state = {
            f"attention.{x}_proj.{p}": t
            for p in ("weight", "bias")
            for x, t in zip("qkv", getattr(block.qkv, p).chunk(3), strict=True)
        }
        ours = {
            "norm1": "attention_norm",
            "norm2": "mlp_norm",
            "out": "attention.o_proj",
            "mlp": "mlp",
        }
        for name, tensor in block.state_dict().items():
            module, _, rest = name.partition(".")
            if module in ours:
                state[f"{ours[module]}.{rest}"] = tensor
        tpk.load_unsharded_state_dict(new, state)
        return new

    def gemms(self, what: str, full: nn.Module) -> nn.Module:
        """This rank's share of the same computation with nobody to talk to; the numbers in it are of no account."""
        place = dict(device=self.device, dtype=next(full.parameters()).dtype, group=self.alone)
        if what == "row":
            return tpk.nn.RowParallelLinear(
                full.in_features // self.size, full.out_features, **place
            )
        if what == "column":
            return tpk.nn.ColumnParallelLinear(
                full.in_features, full.out_features // self.size, **place
            )
        if what == "mlp":
            return tpk.nn.ParallelMLP(
                full.fc1.in_features, full.fc1.out_features // self.size, **place
            )
        hidden, heads = full.out.in_features, full.heads
        new = tpk.nn.ParallelTransformerBlock(hidden, heads, **place)
        new.attention = tpk.nn.ParallelSelfAttention(
            hidden, heads // self.size, head_dim=hidden // heads, **place
        )
        new.mlp = tpk.nn.ParallelMLP(hidden, full.mlp.fc1.out_features // self.size, **place)
        return new
