"""fairscale's model-parallel layers."""

from __future__ import annotations

import torch
from torch import nn

from . import plain


def unavailable() -> str | None:
    return None


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        from fairscale.nn.model_parallel import initialize

        initialize.initialize_model_parallel(world.size)

    def _layer(self, kind: str, linear: nn.Linear, dim: int, **options) -> nn.Module:
        from fairscale.nn.model_parallel import layers

        layer = getattr(layers, kind)(
            linear.in_features, linear.out_features, init_method=lambda weight: weight, **options
        )
        layer = layer.to(device=linear.weight.device, dtype=linear.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(plain.shard(linear.weight, self.rank, self.size, dim))
            layer.bias.copy_(
                plain.shard(linear.bias, self.rank, self.size, 0) if dim == 0 else linear.bias
            )
        return layer

    def column(self, linear: nn.Linear) -> nn.Module:
        return self._layer("ColumnParallelLinear", linear, 0, gather_output=False)

    def row(self, linear: nn.Linear) -> nn.Module:
        return self._layer("RowParallelLinear", linear, 1, input_is_parallel=True)
