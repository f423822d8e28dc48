"""The feed-forward block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..group import GroupLike, resolve_group
from ..ops.activation import GATED
from ..overlap.schedule import Overlap
from .column_linear import ColumnParallelLinear
from .row_linear import RowParallelLinear


class ParallelMLP(nn.Module):
    """fc2(act(fc1(x))): one all-reduce forward, one backward.

    Shapes: input [..., hidden_size], residual the same or None -> [..., hidden_size].

    Collective: every rank of the group must call forward and backward.

    Args:
        hidden_size: of the full block.
        ffn_size: of the full block, any number.
        activation: as ColumnParallelLinear's; for "swiglu" and "geglu" fc1 holds [gate; up],
            2 * ffn_size rows.
        bias: of both layers.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.
        overlap: of both layers: "auto", False (one chunk) or a number of row chunks.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: as the layers.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> mlp = ParallelMLP(16, 64, activation="swiglu", group=mesh["tp"])
        >>> mlp(torch.ones(2, 3, 16)).shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: str = "gelu",
        bias: bool = True,
        group: GroupLike = None,
        overlap: Overlap = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        options: dict[str, Any] = dict(
            group=resolve_group(group), overlap=overlap, device=device, dtype=dtype
        )
        fc1_size = 2 * ffn_size if activation in GATED else ffn_size
        self.fc1 = ColumnParallelLinear(
            hidden_size, fc1_size, bias, activation=activation, **options
        )
        self.fc2 = RowParallelLinear(ffn_size, hidden_size, bias, **options)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return the block's output, + residual in the same pass."""
        return self.fc2(self.fc1(input), residual)
