"""megatron-core's linear layers, with the options that make them run on CPUs too."""

from __future__ import annotations

from torch import Tensor, nn

from . import plain


def unavailable() -> str | None:
    return None


class _Output(nn.Module):
    """Drops the bias from the (output, bias) that megatron-core's layers return."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        from megatron.core import parallel_state  # installed for benchmarks only

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world.size)

    def _layer(self, kind: str, linear: nn.Linear, dim: int, **options) -> nn.Module:
        from megatron.core import ModelParallelConfig, tensor_parallel  # as above

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
        plain.fill(layer, linear, self.rank, self.size, dim)
        return _Output(layer)

    def column(self, linear: nn.Linear) -> nn.Module:
        return self._layer("ColumnParallelLinear", linear, 0, gather_output=False)

    def row(self, linear: nn.Linear) -> nn.Module:
        return self._layer("RowParallelLinear", linear, 1, input_is_parallel=True)
