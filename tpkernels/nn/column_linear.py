"""ColumnParallelLinear: a linear layer sharded by output features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..group import GroupLike, resolve_group
from ..ops.activation import GATED, bias_act, check_activation
from ..ops.collectives import gather_from_tp
from ..ops.column_linear import column_linear_act, column_linears
from ..ops.linear import ReduceOptions
from ..overlap.schedule import Overlap
from ..sharding.spec import ShardSpec
from .parallel_linear import ParallelLinear, linear_features, refuse_sequence_parallel


class ColumnParallelLinear(ParallelLinear):
    """y = act(x A^T + b) with A [out, in] sharded by rows.

    Each rank computes its own output features from the full input. Forward does not communicate.
    Backward has one all-reduce of the input's gradient, in chunks of rows, each under the next
    chunk's GEMM.

    Shapes: input [..., in_features] -> [..., this rank's part of out_features].

    Collective: every rank of the group must call forward and backward.

    Args:
        in_features: of the full layer.
        out_features: of the full layer, any number (ranks hold torch.chunk's sizes). For gated
            activations it counts both halves, [gate; up], and each is sharded separately.
        bias: add a bias.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu" or "geglu".
        gather_output: return the full output on every rank.
        sequence_parallel: not built yet.
        overlap: "auto", False (one chunk) or a number of row chunks.
        device: of the parameters.
        dtype: of the parameters.
        out_spec: which output features each rank has, where not torch.chunk's.

    Raises:
        ValueError: a size below 1, an unknown activation or overlap, an odd out_features for a
            gated activation; forward raises as `column_parallel_linear`.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> layer = ColumnParallelLinear(16, 64, group=mesh["tp"], activation="swiglu")
        >>> layer(torch.ones(2, 16)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: GroupLike = None,
        activation: str | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        overlap: Overlap = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        out_spec: ShardSpec | None = None,
    ):
        refuse_sequence_parallel(sequence_parallel)
        self._init_linear(in_features, out_features, resolve_group(group), overlap)
        self._init_column(activation, gather_output, out_spec)
        self._register_empty(self.out_spec, bias, self.out_spec, device, dtype)

    def _init_column(
        self, activation: str | None, gather_output: bool, out_spec: ShardSpec | None
    ) -> None:
        check_activation(activation)
        size, n, halves = self.group.size, self.out_features, 2 if activation in GATED else 1
        if n % halves:
            raise ValueError(
                f"out_features={n} must be even for {activation}: it counts both halves, [gate; up]"
            )
        self.activation, self.gather_output, self.tag = activation, gather_output, "column_backward"
        self.out_spec = ShardSpec.chunks(n, size, blocks=halves) if out_spec is None else out_spec
        self.max_shard_size = self.out_spec.max_shard_size
        # The last dimension of the output, after the activation.
        if halves == 2:
            self.output_spec = ShardSpec.chunks(n // 2, size, dim=-1)
        else:
            self.output_spec = self.out_spec.along(-1)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        group: GroupLike = None,
        activation: str | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        overlap: Overlap = "auto",
        out_spec: ShardSpec | None = None,
    ) -> ColumnParallelLinear:
        """Shard an nn.Linear (or transformers' Conv1D) that is the same on every rank.

        `linear` stays as it is. The options are the layer's.

        Raises:
            TypeError: `linear` is neither.
            ValueError: as the layer.
        """
        refuse_sequence_parallel(sequence_parallel)
        new = cls.__new__(cls)
        new._init_linear(*linear_features(linear), resolve_group(group), overlap)
        new._init_column(activation, gather_output, out_spec)
        new._register_stock(linear, new.out_spec, new.out_spec)
        return new

    def linear(self, input: Tensor) -> Tensor:
        """Compute x A^T + b without the rest of the fused column group."""
        weight, bias = self.weight_and_bias()
        options = ReduceOptions(self.group, self.max_shard_size, self.overlap, self.tag)
        (y,) = column_linears(input, [weight], [bias], options)
        return y

    def forward(self, input: Tensor) -> Tensor:
        """Return this rank's output features, or with gather_output all of them."""
        if self.activation is None and not self.gather_output:
            y = self._fast_path(input)
            if y is not None:
                return y
        if self.activation is not None and self.region is None:
            weight, bias = self.weight_and_bias()
            options = ReduceOptions(self.group, self.max_shard_size, self.overlap, self.tag)
            y = column_linear_act(input, weight, bias, self.activation, options)
        else:
            y = self.linear(input) if self.region is None else self.region.column(self, input)
            y = bias_act(y, None, self.activation)
        if self.gather_output:
            y = gather_from_tp(y, self.output_spec, self.group, "gather_output")
        return y

    def explain(self, rows: int) -> str:
        """Describe the schedule of the backward all-reduce, its alternatives, and the reason.

        Args:
            rows: rows (tokens) of the input.
        """
        return self._explain(rows, self.in_features, "backward", self.weight.requires_grad)
