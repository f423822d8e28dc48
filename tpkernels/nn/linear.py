"""Linear layers split by output features (column) or by input features (row)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _C
from ..group import Group, resolve_group
from ..ops.activation import GATED, bias_act, check_activation
from ..ops.comm import gather
from ..ops.linear import column_linear_act, column_linears, linear_now, row_parallel_linear
from ..schedule import check_overlap
from ..schedule.explain import explain
from ..shard import Split
from .norm import RMSNorm
from .sharded import Sharded


class _ParallelLinear(Sharded, nn.Module):
    """What the two layers share.

    `transposed`: the weight is stored [in, out], as transformers' Conv1D stores it. `share`: of the split features, the largest rank's.
    """

    def _init_linear(self, in_features: int, out_features: int, group: Group, overlap) -> None:
        nn.Module.__init__(self)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
        check_overlap(overlap)
        self._init_sharded(group)
        self.in_features, self.out_features, self.overlap = in_features, out_features, overlap
        self.transposed = False
        self.region = None

    def _from(self, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The stock weight and bias of an nn.Linear or a Conv1D."""
        self.transposed = not isinstance(linear, nn.Linear)
        self.training = linear.training
        return linear.weight, linear.bias

    def _weight_split(self, split: Split) -> Split:
        """Of the weight as it is stored."""
        return (
            Split(1 - split.dim, split.size, split.ranges, split.replicated)
            if self.transposed
            else split
        )

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        weight = self.local("weight", cast=True)
        return weight.t() if self.transposed else weight, self.local("bias", cast=True)

    def _now(self, input: Tensor) -> Tensor | None:
        """The whole forward where it is a plain product of the parameters as they are, else None; a few microseconds either way."""
        if self.region is not None or self.transposed or self.splits["weight"].replicated:
            return None
        parameters = self._parameters
        return linear_now(input, parameters["weight"], parameters["bias"])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """nn.Linear's initialisation: for one seed the same full weights at any TP size. Draws one full weight at a time."""
        like = self.weight
        stock = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=like.device,
            dtype=like.dtype,
        )
        self.fill("weight", stock.weight.t() if self.transposed else stock.weight)
        if self.bias is not None:
            self.fill("bias", stock.bias)

    def _explain(self, rows: int, features: int, when: str, weight_grad: bool = False) -> str:
        together = (
            [self]
            if self.region is None or self not in self.region.siblings
            else self.region.siblings
        )
        share = sum(layer.share for layer in together)
        text = explain(
            self.overlap, rows, features, self.group, share, self.weight.dtype, weight_grad
        )
        return "\n".join(
            [
                f"{self}",
                f"{when}: {text}",
                *[self._explain_gemm(rows)] * (self.weight.device.type == "cpu"),
            ]
        )

    def _explain_gemm(self, rows: int) -> str:
        """How the forward product of `rows` rows is computed, and what a packed copy of the weight takes."""
        with torch.no_grad():
            weight, _ = self.weight_and_bias()

        def name(library, wide, packed) -> str:
            return (
                {"aten": "at::mm", "mkl": "MKL", "onednn": "oneDNN"}[library.name]
                + " in float32" * wide
                + " on packed weights" * packed
            )

        constant, training = (_C.choose_gemm(weight, rows, constant) for constant in (True, False))
        text = f"gemm of {rows} rows: {name(*constant)} without gradient, {name(*training)} with"
        _, wide, packed = constant
        size, held = (
            weight.numel() * (4 if wide else weight.element_size()),
            _C.packed_bytes(weight),
        )
        if packed:
            text += f"; the packed copy takes {size:,} bytes from the second call on"
        return text + (f"; {held:,} bytes are held now" if packed or held else "")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, rank {self.group.rank} of {self.group.size}, overlap={self.overlap!r}"


class ColumnParallelLinear(_ParallelLinear):
    """y = act(x A^T + b) with A [out, in] split by rows: each rank computes its own output features from the whole input.

    No communication forward; backward one all-reduce of the input's gradient, in chunks of rows under its GEMM.

    Args:
        in_features, out_features: of the whole layer; any size (ranks hold torch.chunk's sizes).
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.
        activation: None, "relu", "relu2", "gelu", "gelu_tanh", "silu", or the gated "swiglu", "geglu", whose out_features counts
            both halves, [gate; up]; each half is split separately.
        gather_output: return the whole output on every rank.
        overlap: "auto", False (one chunk) or a number of row chunks.
        out_split: which output features each rank has, where not torch.chunk's.

    Shapes: input [..., in_features] -> [..., this rank's share of out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group=None,
        activation: str | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        overlap: str | bool | int = "auto",
        device=None,
        dtype=None,
        out_split: Split | None = None,
    ):
        _refuse_sequence_parallel(sequence_parallel)
        self._setup(
            in_features,
            out_features,
            resolve_group(group),
            activation,
            gather_output,
            overlap,
            out_split,
        )
        self.put_empty("weight", (out_features, in_features), self.out_split, device, dtype)
        if bias:
            self.put_empty("bias", (out_features,), self.out_split, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _setup(
        self, in_features, out_features, group, activation, gather_output, overlap, out_split
    ) -> None:
        self._init_linear(in_features, out_features, group, overlap)
        check_activation(activation)
        halves = 2 if activation in GATED else 1
        if out_features % halves:
            raise ValueError(
                f"out_features={out_features} must be even for {activation}: it counts both halves, [gate; up]"
            )
        self.activation, self.gather_output, self.tag = activation, gather_output, "column_backward"
        self.out_split = (
            out_split
            if out_split is not None
            else Split.chunks(out_features, group.size, blocks=halves)
        )
        self.share = self.out_split.largest
        # The layout of the output's last dimension, after the activation.
        self.output_split = (
            Split.chunks(out_features // 2, group.size, dim=-1)
            if halves == 2
            else _last_dim(self.out_split)
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        group=None,
        activation: str | None = None,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        overlap: str | bool | int = "auto",
        out_split: Split | None = None,
    ) -> ColumnParallelLinear:
        """This rank's share of an nn.Linear (or transformers' Conv1D) that is the same on every rank; `linear` is left as it is."""
        _refuse_sequence_parallel(sequence_parallel)
        new = cls.__new__(cls)
        in_features, out_features = linear_features(linear)
        new._setup(
            in_features,
            out_features,
            resolve_group(group),
            activation,
            gather_output,
            overlap,
            out_split,
        )
        weight, bias = new._from(linear)
        new.put("weight", weight, new._weight_split(new.out_split))
        new.put("bias", bias, new.out_split)
        return new

    def linear(self, input: Tensor) -> Tensor:
        """x A^T + b without the siblings."""
        weight, bias = self.weight_and_bias()
        return column_linears(
            input, [weight], [bias], self.group, self.overlap, self.tag, self.share
        )[0]

    def forward(self, input: Tensor) -> Tensor:
        if (
            self.activation is None
            and not self.gather_output
            and (y := self._now(input)) is not None
        ):
            return y
        if self.activation is not None and self.region is None:
            y = column_linear_act(
                input,
                *self.weight_and_bias(),
                self.activation,
                self.group,
                self.overlap,
                self.tag,
                self.share,
            )
        else:
            y = self.linear(input) if self.region is None else self.region.column(self, input)
            y = bias_act(y, None, self.activation)
        return (
            gather(y, self.output_split, self.group, "gather_output") if self.gather_output else y
        )

    def explain(self, rows: int) -> str:
        """The schedule of the backward all-reduce for an input of `rows` rows (tokens), its alternatives, and why."""
        return self._explain(rows, self.in_features, "backward", self.weight.requires_grad)


class RowParallelLinear(_ParallelLinear):
    """y = x A^T + b with A [out, in] split by columns: each rank multiplies its own input features, and the results are summed.

    Forward one all-reduce, in chunks of rows, each under the next chunk's GEMM; backward no communication.

    Args:
        in_features, out_features: of the whole layer; any size (ranks hold torch.chunk's sizes).
        group: a ProcessGroup, a 1-D DeviceMesh, or None for the "tp" group of `tpk.init_mesh`.
        input_is_parallel: the input is this rank's features, as a ColumnParallelLinear returns them; False: it is whole.
        skip_bias_add: return (output, bias) and leave the addition to the caller.
        overlap: "auto", False (one chunk) or a number of row chunks.
        in_split: which input features each rank has, where not torch.chunk's.

    Shapes: input [..., this rank's share of in_features] -> [..., out_features], whole and bit-equal on every rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group=None,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        overlap: str | bool | int = "auto",
        device=None,
        dtype=None,
        in_split: Split | None = None,
    ):
        _refuse_sequence_parallel(sequence_parallel)
        self._setup(
            in_features,
            out_features,
            resolve_group(group),
            input_is_parallel,
            skip_bias_add,
            overlap,
            in_split,
        )
        self.put_empty("weight", (out_features, in_features), self.in_split, device, dtype)
        if bias:
            self.put_empty("bias", (out_features,), None, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _setup(
        self, in_features, out_features, group, input_is_parallel, skip_bias_add, overlap, in_split
    ) -> None:
        self._init_linear(in_features, out_features, group, overlap)
        self.input_is_parallel, self.skip_bias_add = input_is_parallel, skip_bias_add
        self.in_split = (
            in_split if in_split is not None else Split.chunks(in_features, group.size, dim=1)
        )
        self.input_split, self.share = _last_dim(self.in_split), self.in_split.largest

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        group=None,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        overlap: str | bool | int = "auto",
        in_split: Split | None = None,
    ) -> RowParallelLinear:
        """This rank's share of an nn.Linear (or transformers' Conv1D) that is the same on every rank; `linear` is left as it is."""
        _refuse_sequence_parallel(sequence_parallel)
        new = cls.__new__(cls)
        in_features, out_features = linear_features(linear)
        new._setup(
            in_features,
            out_features,
            resolve_group(group),
            input_is_parallel,
            skip_bias_add,
            overlap,
            in_split,
        )
        weight, bias = new._from(linear)
        new.put("weight", weight, new._weight_split(new.in_split))
        new.put("bias", bias, None)
        return new

    def forward(self, input: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None):
        """With `norm` returns (norm(output), output), in one pass where that is possible.

        Raises:
            ValueError: norm with skip_bias_add, which leaves nothing to be normed yet; otherwise as `row_parallel_linear`.
        """
        alone = (
            self.group.size == 1 and residual is None and norm is None and not self.skip_bias_add
        )
        if alone and (y := self._now(input)) is not None:
            return y
        if norm is not None and self.skip_bias_add:
            raise ValueError(
                "norm needs the whole output, but skip_bias_add=True leaves its bias to the caller: pass one of them"
            )
        if self.region is not None:
            self.region.leave()
        weight, bias = self.weight_and_bias()
        output = row_parallel_linear(
            input,
            weight,
            None if self.skip_bias_add else bias,
            group=self.group,
            residual=residual,
            input_is_parallel=self.input_is_parallel,
            in_split=self.input_split,
            norm=None if norm is None else (norm.weight, norm.epsilon(input.dtype)),
            overlap=self.overlap,
        )
        return (output, bias) if self.skip_bias_add else output

    def explain(self, rows: int) -> str:
        """The schedule of the forward all-reduce for an input of `rows` rows (tokens), its alternatives, and why."""
        return self._explain(rows, self.out_features, "forward")


def _last_dim(split: Split) -> Split:
    return Split(-1, split.size, split.ranges, split.replicated)


def linear_features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of an nn.Linear, or of a transformers Conv1D, whose weight is [in, out]; raises TypeError for anything else.

    A subclass with a forward of its own (a quantised layer) is something else: its forward would be lost.
    """
    stock = type(linear).__name__ == "Conv1D" or (
        isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    )
    if not stock:
        raise TypeError(
            f"linear must be an nn.Linear with nn.Linear's forward, or a transformers Conv1D, got {type(linear).__name__}"
        )
    rows, columns = linear.weight.shape
    return (columns, rows) if isinstance(linear, nn.Linear) else (rows, columns)


def _refuse_sequence_parallel(sequence_parallel: bool) -> None:
    if sequence_parallel:
        raise NotImplementedError("sequence_parallel=True is not built yet: pass False")
