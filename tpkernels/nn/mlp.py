"""The feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from ..group import resolve_group
from ..ops.activation import GATED
from .linear import ColumnParallelLinear, RowParallelLinear


class ParallelMLP(nn.Module):
    """fc2(act(fc1(x))): one all-reduce forward, one backward.

    Args:
        hidden_size, ffn_size: of the whole block; any ffn_size.
        activation: as ColumnParallelLinear's; for "swiglu" and "geglu" fc1 holds [gate; up], 2 * ffn_size rows.

    Shapes: input [..., hidden_size], residual the same or None -> [..., hidden_size].
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        group=None,
        overlap="auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        options = dict(group=resolve_group(group), overlap=overlap, device=device, dtype=dtype)
        width = 2 * ffn_size if activation in GATED else ffn_size
        self.fc1 = ColumnParallelLinear(hidden_size, width, bias, activation=activation, **options)
        self.fc2 = RowParallelLinear(ffn_size, hidden_size, bias, **options)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.fc2(self.fc1(input), residual)
