"""A decoder-only transformer's sizes, parameters and floating-point operations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from .errors import PlanError, whole_number

DATA = Path(__file__).parent / "data"


def ceil_div(a: int, b: int) -> int:
    """Divide and round up."""
    return -(-a // b)


@dataclass(frozen=True)
class Linear:
    """The matrix of a linear layer.

    Attributes:
        in_features, out_features: its sizes.
        bias: it adds one.
        style: "colwise" or "rowwise", the dimension that the TP ranks shard.
    """

    in_features: int
    out_features: int
    bias: bool
    style: str

    @property
    def parameters(self) -> int:
        """Number of parameters, the bias included."""
        return self.in_features * self.out_features + self.bias * self.out_features

    def shard(self, tp: int) -> Linear:
        """Return the largest of `tp` ranks' shards; each has a row-parallel layer's whole bias."""
        if self.style == "colwise":
            return replace(self, out_features=ceil_div(self.out_features, tp))
        return replace(self, in_features=ceil_div(self.in_features, tp))


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer of `layers` equal blocks.

    Attributes:
        hidden, layers, heads, vocab: its sizes.
        kv_heads: key and value heads of grouped-query attention; None: as many as heads.
        head_dim: features of a head; None: hidden / heads.
        ffn: inner features of the MLP (of each half if `gated`); None: 4 hidden.
        gated: the MLP has a gate, as SwiGLU has.
        tied: the output layer's weight is the embedding's.
        positions: rows of the embedding of learned positions; 0: none.
        qkv_bias, out_bias, mlp_bias: those linear layers have a bias.
        norm: parameters of a norm per feature: 2 (LayerNorm with bias), 1 or 0.
        norms: norms of `hidden` features in a block.
        final_norm: one more norm follows the last block.
        qk_norm: parameters of the norms of queries and keys in a block.
        extra: parameters outside the blocks that none of these covers.
        name: its name in tables and messages.

    Raises:
        PlanError: a size is not a whole number or does not fit the others.

    Example:
        >>> from tpkernels_planner import Model
        >>> gpt2 = Model(hidden=768, layers=12, heads=12, vocab=50257, positions=1024, tied=True)
        >>> gpt2.parameters
        124439808
    """

    hidden: int
    layers: int
    heads: int
    vocab: int
    # __post_init__ puts a number in the place of None.
    kv_heads: int = None  # pyright: ignore[reportAssignmentType]
    head_dim: int = None  # pyright: ignore[reportAssignmentType]
    ffn: int = None  # pyright: ignore[reportAssignmentType]
    gated: bool = False
    tied: bool = False
    positions: int = 0
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    norm: int = 2
    norms: int = 2
    final_norm: bool = True
    qk_norm: int = 0
    extra: int = 0
    name: str = field(default="", compare=False)

    def __post_init__(self):
        for name in ("hidden", "layers", "heads", "vocab"):
            whole_number(name, getattr(self, name))
        if self.head_dim is None and self.hidden % self.heads:
            raise PlanError(
                f"hidden={self.hidden} is not a multiple of heads={self.heads}: pass head_dim too"
            )
        defaults = {
            "kv_heads": self.heads,
            "ffn": 4 * self.hidden,
            "head_dim": self.hidden // self.heads,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            whole_number(name, getattr(self, name))
        if self.kv_heads > self.heads or self.heads % self.kv_heads:
            raise PlanError(
                f"kv_heads={self.kv_heads} must divide heads={self.heads}: "
                "each serves as many query heads"
            )
        for name in ("positions", "qk_norm", "extra"):
            whole_number(name, getattr(self, name), 0)

    @property
    def query_features(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """One block's matrices. Q, K, V are one, and gate, up are one: they read one input."""
        qkv = self.query_features + 2 * self.kv_heads * self.head_dim
        up = self.ffn * (2 if self.gated else 1)
        return {
            "qkv": Linear(self.hidden, qkv, self.qkv_bias, "colwise"),
            "attention_out": Linear(self.query_features, self.hidden, self.out_bias, "rowwise"),
            "up": Linear(self.hidden, up, self.mlp_bias, "colwise"),
            "down": Linear(self.ffn, self.hidden, self.mlp_bias, "rowwise"),
        }

    @property
    def norm_parameters(self) -> int:
        """Parameters of one block's norms. Every TP rank keeps all of them."""
        return self.norms * self.norm * self.hidden + self.qk_norm

    @cached_property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        return sum(linear.parameters for linear in self.linears.values()) + self.norm_parameters

    @cached_property
    def embedding_parameters(self) -> int:
        """Parameters of the embeddings of tokens and of positions."""
        return (self.vocab + self.positions) * self.hidden

    @property
    def final_norm_parameters(self) -> int:
        """Parameters of the norm after the last block."""
        return self.final_norm * self.norm * self.hidden

    @cached_property
    def output_parameters(self) -> int:
        """Parameters of the final norm and of an output layer that has its own weight."""
        own_weight = 0 if self.tied else self.vocab * self.hidden
        return self.final_norm_parameters + own_weight

    @cached_property
    def parameters(self) -> int:
        """Parameters of the model."""
        return (
            self.layers * self.block_parameters
            + self.embedding_parameters
            + self.output_parameters
            + self.extra
        )

    def forward_flops(self, seq: int) -> int:
        """Count the floating-point operations of one sequence's forward pass.

        A multiply-add counts as 2. Matrix products count, and attention over the whole sequence,
        as Megatron-LM counts them: times 3 it is 72 s l h^2 (1 + s / 6h + V / 12lh), equation 3 of
        Narayanan et al., arXiv 2104.04473.

        Args:
            seq: tokens of the sequence.
        """
        linears = self.linears.values()
        matrices = sum(linear.in_features * linear.out_features for linear in linears)
        blocks = self.layers * (matrices + 2 * seq * self.query_features)
        return 2 * seq * (blocks + self.vocab * self.hidden)

    def step_flops(self, seq: int) -> int:
        """Count one sequence's forward and backward pass, without recomputation."""
        return 3 * self.forward_flops(seq)
