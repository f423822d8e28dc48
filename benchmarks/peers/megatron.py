"""megatron-core's linear layers, with what makes them run on CPUs too."""

from __future__ import annotations

import torch
from torch import nn

from . import plain


def unavailable() -> str | None:
    return None


class _Output(nn.Module):
    """Its layers return (output, bias)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world.size)

    def _layer(self, kind: str, linear: nn.Linear, dim: int, **options) -> nn.Module:
        from megatron.core import ModelParallelConfig, tensor_parallel

        config = ModelParallelConfig(
            tensor_model_parallel_size=self.size,
            use_cpu_initialization=linear.weight.device.type == "cpu",
            gradient_accumulation_fusion=False,
            params_dtype=linear.weight.dtype,
        )
        layer = getattr(tensor_parallel, kind)(
            linear.in_features,
            linear.out_features,
            config=config,
            init_method=lambda weight: None,
            bias=True,
            skip_bias_add=False,
            **options,
        )
        with torch.no_grad():
            layer.weight.copy_(plain.shard(linear.weight, self.rank, self.size, dim))
            layer.bias.copy_(
                plain.shard(linear.bias, self.rank, self.size, 0) if dim == 0 else linear.bias
            )
        return _Output(layer)

    def column(self, linear: nn.Linear) -> nn.Module:
        return self._layer("ColumnParallelLinear", linear, 0, gather_output=False)

    def row(self, linear: nn.Linear) -> nn.Module:
        return self._layer("RowParallelLinear", linear, 1, input_is_parallel=True)
