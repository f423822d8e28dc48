"""Base of the column- and row-parallel linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _C
from ..group import Group
from ..ops.linear import linear_fast_path
from ..overlap.cost_model import GemmShape
from ..overlap.explain import explain
from ..overlap.schedule import Overlap, check_overlap
from ..sharding.module import ShardedModule
from ..sharding.spec import ShardSpec
from .tp_region import TPRegion

_LIBRARIES = {"aten": "at::mm", "mkl": "MKL", "onednn": "oneDNN"}


class ParallelLinear(ShardedModule):
    """State and methods that the two layers share.

    Attributes:
        in_features: of the full layer.
        out_features: of the full layer.
        overlap: "auto", False (one chunk) or a number of row chunks.
        transposed: the weight is stored [in, out], as transformers' Conv1D stores it.
        region: the TP region that the layer begins or ends, or None.
        max_shard_size: sharded features on the largest rank.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    max_shard_size: int

    def _init_linear(
        self, in_features: int, out_features: int, group: Group, overlap: Overlap
    ) -> None:
        nn.Module.__init__(self)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
        check_overlap(overlap)
        self._init_sharded(group)
        self.in_features, self.out_features = in_features, out_features
        self.overlap: Overlap = overlap
        self.transposed = False
        self.region: TPRegion | None = None

    def _register_empty(self, spec: ShardSpec, bias: bool, bias_spec, device, dtype) -> None:
        """Register uninitialised parameters and initialise them."""
        shape = self.out_features, self.in_features
        self.register_empty_shard("weight", shape, spec, device, dtype)
        if bias:
            self.register_empty_shard("bias", shape[:1], bias_spec, device, dtype)
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def _register_stock(self, linear: Any, spec: ShardSpec, bias_spec) -> None:
        """Register this rank's shards of an nn.Linear or a Conv1D."""
        self.transposed = not isinstance(linear, nn.Linear)
        self.training = linear.training
        if self.transposed:
            spec = spec.along(1 - spec.dim)
        self.register_shard("weight", linear.weight, spec)
        self.register_shard("bias", linear.bias, bias_spec)

    def weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight [N_r, K_r] and the bias that this rank's forward reads."""
        weight = self.local_tensor("weight", cast=True)
        assert weight is not None
        return weight.t() if self.transposed else weight, self.local_tensor("bias", cast=True)

    def _fast_path(self, input: Tensor) -> Tensor | None:
        """Return the forward where it is a plain product of the parameters as they are, else None.

        It takes a few microseconds either way.
        """
        spec = self.shard_specs["weight"]
        if self.region is not None or self.transposed or (spec is not None and spec.replicated):
            return None
        parameters: Any = self._parameters
        return linear_fast_path(input, parameters["weight"], parameters["bias"])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as nn.Linear: for one seed the same full weights at any TP size.

        It draws one full weight at a time.
        """
        stock = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        self.copy_from_full("weight", stock.weight.t() if self.transposed else stock.weight)
        if self.bias is not None:
            self.copy_from_full("bias", stock.bias)

    def _explain(self, rows: int, n: int, when: str, weight_grad: bool = False) -> str:
        columns = [self]
        if self.region is not None and self in self.region.fused_columns.layers:
            columns = self.region.fused_columns.layers
        k = sum(layer.max_shard_size for layer in columns)
        shape = GemmShape(rows, k, n, weight_grad)
        text = explain(self.overlap, shape, self.group, self.weight.dtype)
        lines = [f"{self}", f"{when}: {text}"]
        if self.weight.device.type == "cpu":
            lines.append(self._explain_gemm(rows))
        return "\n".join(lines)

    def _explain_gemm(self, rows: int) -> str:
        """Say how the forward's GEMM is computed, and what a packed copy of the weight takes."""
        with torch.no_grad():
            weight, _ = self.weight_and_bias()
        inference = _C.choose_gemm(weight, rows, True)
        training = _C.choose_gemm(weight, rows, False)
        text = (
            f"gemm of {rows} rows: {_gemm_name(*inference)} without gradient, "
            f"{_gemm_name(*training)} with"
        )
        _, in_float32, is_packed = inference
        held_bytes = _C.packed_bytes(weight)
        if is_packed:
            itemsize = 4 if in_float32 else weight.element_size()
            text += (
                f"; the packed copy takes {weight.numel() * itemsize:,} bytes "
                "from the second call on"
            )
        if is_packed or held_bytes:
            text += f"; {held_bytes:,} bytes are held now"
        return text

    def extra_repr(self) -> str:
        """Return sizes, rank and overlap for repr."""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"rank {self.group.rank} of {self.group.size}, overlap={self.overlap!r}"
        )


def _gemm_name(library, in_float32: bool, is_packed: bool) -> str:
    name = _LIBRARIES[library.name]
    if in_float32:
        name += " in float32"
    if is_packed:
        name += " on packed weights"
    return name


def linear_features(linear: Any) -> tuple[int, int]:
    """Return (in, out) features of an nn.Linear, or of a Conv1D, whose weight is [in, out].

    Raises:
        TypeError: it is anything else. A subclass with a forward of its own (a quantised layer)
            counts as such: its forward would be lost.
    """
    is_linear = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if not is_linear and type(linear).__name__ != "Conv1D":
        raise TypeError(
            "linear must be an nn.Linear with nn.Linear's forward, or a transformers Conv1D, "
            f"got {type(linear).__name__}"
        )
    rows, columns = linear.weight.shape
    return (columns, rows) if is_linear else (rows, columns)


def refuse_sequence_parallel(sequence_parallel: bool) -> None:
    """Raise NotImplementedError for sequence_parallel=True."""
    if sequence_parallel:
        raise NotImplementedError("sequence_parallel=True is not built yet: pass False")
