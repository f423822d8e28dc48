"""RowParallelLinear: a linear layer sharded by input features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..group import GroupLike, resolve_group
from ..ops.linear import ReduceOptions
from ..ops.row_linear import row_linear, scatter_input
from ..overlap.schedule import Overlap
from ..sharding.spec import ShardSpec
from .norm import RMSNorm
from .parallel_linear import ParallelLinear, linear_features, refuse_sequence_parallel


class RowParallelLinear(ParallelLinear):
    """y = x A^T + b with A [out, in] sharded by columns.

    Each rank multiplies its own input features, and the results are summed. Forward has one
    all-reduce, in chunks of rows, each under the next chunk's GEMM. Backward does not communicate.

    Shapes: input [..., this rank's part of in_features] -> [..., out_features], full and bit-equal
    on every rank.

    Collective: every rank of the group must call forward.

    Args:
        in_features: of the full layer, any number (ranks hold torch.chunk's sizes).
        out_features: of the full layer.
        bias: add a bias.
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.
        input_is_parallel: the input is this rank's features, as a ColumnParallelLinear returns
            them; False: it is full.
        skip_bias_add: return (output, bias) and leave the addition to the caller.
        sequence_parallel: not built yet.
        overlap: "auto", False (one chunk) or a number of row chunks.
        device: of the parameters.
        dtype: of the parameters.
        in_spec: which input features each rank has, where not torch.chunk's.

    Raises:
        ValueError: a size below 1, an unknown overlap; forward raises as `row_parallel_linear`.

    Example:
        >>> import tpkernels as tpk
        >>> mesh = tpk.init_mesh(tp=1, device="cpu")
        >>> layer = RowParallelLinear(64, 16, group=mesh["tp"])
        >>> layer(torch.ones(2, 64), residual=torch.ones(2, 16)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: GroupLike = None,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        overlap: Overlap = "auto",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        in_spec: ShardSpec | None = None,
    ):
        refuse_sequence_parallel(sequence_parallel)
        self._init_linear(in_features, out_features, resolve_group(group), overlap)
        self._init_row(input_is_parallel, skip_bias_add, in_spec)
        self._register_empty(self.in_spec, bias, None, device, dtype)

    def _init_row(
        self, input_is_parallel: bool, skip_bias_add: bool, in_spec: ShardSpec | None
    ) -> None:
        self.input_is_parallel, self.skip_bias_add = input_is_parallel, skip_bias_add
        if in_spec is None:
            in_spec = ShardSpec.chunks(self.in_features, self.group.size, dim=1)
        self.in_spec = in_spec
        self.input_spec = in_spec.along(-1)
        self.max_shard_size = in_spec.max_shard_size

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        group: GroupLike = None,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        overlap: Overlap = "auto",
        in_spec: ShardSpec | None = None,
    ) -> RowParallelLinear:
        """Shard an nn.Linear (or transformers' Conv1D) that is the same on every rank.

        `linear` stays as it is. The options are the layer's.

        Raises:
            TypeError: `linear` is neither.
            ValueError: as the layer.
        """
        refuse_sequence_parallel(sequence_parallel)
        new = cls.__new__(cls)
        new._init_linear(*linear_features(linear), resolve_group(group), overlap)
        new._init_row(input_is_parallel, skip_bias_add, in_spec)
        new._register_stock(linear, new.in_spec, None)
        return new

    def forward(self, input: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None):
        """Compute the output.

        Args:
            input: [..., this rank's part of in_features], or the full input.
            residual: [..., out_features], added in the same pass as the bias.
            norm: an RMSNorm of the output, in one pass where that is possible.

        Returns:
            output [..., out_features]; (norm(output), output) with `norm`; (output, bias) with
            skip_bias_add.

        Raises:
            TypeError: as `row_parallel_linear`.
            ValueError: as `row_parallel_linear`; norm with skip_bias_add, which leaves nothing to
                be normed yet.
        """
        if self.group.size == 1 and residual is None and norm is None and not self.skip_bias_add:
            y = self._fast_path(input)
            if y is not None:
                return y
        if norm is not None and self.skip_bias_add:
            raise ValueError(
                "norm needs the whole output, but skip_bias_add=True leaves its bias to the "
                "caller: pass one of them"
            )
        if self.region is not None and self.region.rng.is_forked:
            self.region.rng.restore()  # from here on ranks compute the same again
        weight = self.local_tensor("weight", cast=True)
        bias = self.local_tensor("bias", cast=True)
        assert weight is not None
        if self.transposed:
            weight = weight.t()
        weight_and_eps = None if norm is None else (norm.weight, norm.epsilon(input.dtype))
        if not self.input_is_parallel:
            input = scatter_input(input, self.input_spec, self.group)
        output = row_linear(
            input,
            weight,
            None if self.skip_bias_add else bias,
            residual,
            ReduceOptions(self.group, self.max_shard_size, self.overlap, "row_forward"),
            weight_and_eps,
        )
        return (output, bias) if self.skip_bias_add else output

    def explain(self, rows: int) -> str:
        """Describe the schedule of the forward all-reduce, its alternatives, and the reason.

        Args:
            rows: rows (tokens) of the input.
        """
        return self._explain(rows, self.out_features, "forward")
