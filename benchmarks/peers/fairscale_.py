"""fairscale's model-parallel linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from . import plain


def unavailable() -> str | None:
    return None


def _no_init(weight: Tensor) -> Tensor:
    return weight


class Peer(plain.Peer):
    def __init__(self, world):
        super().__init__(world)
        from fairscale.nn.model_parallel import initialize  # installed for benchmarks only

        initialize.initialize_model_parallel(world.size)

    def _layer(self, kind: str, linear: nn.Linear, dim: int, **options) -> nn.Module:
        from fairscale.nn.model_parallel import layers  # as above

        make = getattr(layers, kind)
        layer = make(linear.in_features, linear.out_features, init_method=_no_init, **options)
        layer = layer.to(device=linear.weight.device, dtype=linear.weight.dtype)
        plain.fill(layer, linear, self.rank, self.size, dim)
        return layer

    def column(self, linear: nn.Linear) -> nn.Module:
        return self._layer("ColumnParallelLinear", linear, 0, gather_output=False)

    def row(self, linear: nn.Linear) -> nn.Module:
        return self._layer("RowParallelLinear", linear, 1, input_is_parallel=True)
