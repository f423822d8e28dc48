"""A decoder-only transformer as the planner sees it: its sizes, parameters and floating-point operations, exactly."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data"


class PlanError(ValueError):
    """What was asked for cannot be planned; the message says what would."""


def count(name: str, value: Any, least: int = 1) -> int:
    """`value` as a whole number of at least `least`; PlanError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise PlanError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


def near(what: str, name: str, known) -> PlanError:
    """For a name that is not known, with those that look like it."""
    known = sorted(known)
    close = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.4)
    return PlanError(
        f"no {what} is named {name!r}; "
        + (f"near it: {', '.join(close)}" if close else f"known: {', '.join(known)}")
    )


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Linear:
    """A layer's matrix: `split` "column" or "row" over the TP ranks."""

    inputs: int
    outputs: int
    bias: bool
    split: str

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.bias * self.outputs

    def shard(self, tp: int) -> Linear:
        """The largest of `tp` ranks' part. A row-parallel layer's bias is whole on each."""
        if self.split == "column":
            return replace(self, outputs=ceil_div(self.outputs, tp))
        return replace(self, inputs=ceil_div(self.inputs, tp))


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer of `layers` equal blocks.

    Attributes:
        hidden, layers, heads, vocab: sizes.
        kv_heads: of grouped-query attention; None: as many as heads.
        head_dim: None: hidden / heads.
        ffn: inner features of the MLP (of each half if `gated`); None: 4 hidden.
        tied: the output layer's weight is the embedding's.
        positions: rows of a table of learned positions; 0: none.
        qkv_bias, out_bias, mlp_bias: whether those linear layers have one.
        norm: parameters of a norm per feature: 2 (LayerNorm with bias), 1 or 0.
        norms: norms of `hidden` features in a block. `final_norm`: and one after the last.
        qk_norm: features of the norms of queries and keys in a block, together, times `norm`'s parameters: a plain count.
        extra: parameters outside the blocks that none of these covers.
    """

    hidden: int
    layers: int
    heads: int
    vocab: int
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn: int | None = None
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
            count(name, getattr(self, name))
        defaults = {"kv_heads": self.heads, "ffn": 4 * self.hidden}
        if self.head_dim is None and self.hidden % self.heads:
            raise PlanError(
                f"hidden={self.hidden} is not a multiple of heads={self.heads}: pass head_dim too"
            )
        defaults["head_dim"] = self.hidden // self.heads
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
            count(name, getattr(self, name))
        if self.kv_heads > self.heads or self.heads % self.kv_heads:
            raise PlanError(
                f"kv_heads={self.kv_heads} must divide heads={self.heads}: each serves as many query heads"
            )
        for name in ("positions", "qk_norm", "extra"):
            count(name, getattr(self, name), 0)

    @property
    def attention(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """One block's matrices. Q, K, V and gate, up count as one each: they read one input."""
        qkv = self.attention + 2 * self.kv_heads * self.head_dim
        up = self.ffn * (2 if self.gated else 1)
        return {
            "qkv": Linear(self.hidden, qkv, self.qkv_bias, "column"),
            "attention_out": Linear(self.attention, self.hidden, self.out_bias, "row"),
            "up": Linear(self.hidden, up, self.mlp_bias, "column"),
            "down": Linear(self.ffn, self.hidden, self.mlp_bias, "row"),
        }

    @cached_property
    def block_parameters(self) -> int:
        return (
            sum(linear.parameters for linear in self.linears.values())
            + self.norms * self.norm * self.hidden
            + self.qk_norm
        )

    @cached_property
    def embedding_parameters(self) -> int:
        """The table of tokens, and of positions."""
        return (self.vocab + self.positions) * self.hidden

    @cached_property
    def output_parameters(self) -> int:
        """The final norm, and the output layer's own weight."""
        return self.final_norm * self.norm * self.hidden + (
            0 if self.tied else self.vocab * self.hidden
        )

    @cached_property
    def parameters(self) -> int:
        return (
            self.layers * self.block_parameters
            + self.embedding_parameters
            + self.output_parameters
            + self.extra
        )

    def forward_flops(self, seq: int) -> int:
        """Floating-point operations of one sequence's forward pass: 2 a multiply-add, matrix products only, attention over all of
        the sequence, as Megatron-LM counts them (SC21, equation 3: times 3 it is 72 s l h^2 (1 + s/6h + V/12lh))."""
        matrices = sum(linear.inputs * linear.outputs for linear in self.linears.values())
        return (
            2
            * seq
            * (self.layers * (matrices + 2 * seq * self.attention) + self.vocab * self.hidden)
        )

    def step_flops(self, seq: int) -> int:
        """Of one sequence's forward and backward pass, without recomputation."""
        return 3 * self.forward_flops(seq)


# What transformers' configurations default to, by model_type, where it is not what `from_config` takes otherwise.
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(head_dim=128, qk_norm="head"),
    "olmo2": dict(qk_norm="all"),
    "gemma2": dict(head_dim=256, tied=True, norms=4),
    "gemma3_text": dict(head_dim=256, tied=True, norms=4, qk_norm="head"),
    "stablelm": dict(norm=2),
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
}


def from_config(config: dict[str, Any], name: str = "config.json") -> Model:
    """The model of a Hugging Face config.json, for the families that `tpk.parallelize` splits.

    Raises:
        PlanError: another family, a mixture of experts, a missing key (named), or sizes that do not fit.
    """
    if not isinstance(config, dict):
        raise PlanError(f"{name} is not the configuration of a model: it holds no object of keys")
    if "text_config" in config and "hidden_size" not in config:
        config = config["text_config"]
    kind = config.get("model_type")
    if kind is None:
        raise PlanError(f"{name} has no key 'model_type'")
    if kind not in _FAMILIES:
        raise near("model family that the planner knows", str(kind), _FAMILIES)
    family = _FAMILIES[kind]

    def need(key: str) -> int:
        if config.get(key) is None:
            raise PlanError(f"{name} has no key {key!r}, which a {kind} model needs")
        return count(f"{name}: {key}", config[key])

    def get(key: str, default):
        return default if config.get(key) is None else config[key]

    if kind == "gpt2":
        return Model(
            need("n_embd"),
            need("n_layer"),
            need("n_head"),
            need("vocab_size"),
            ffn=get("n_inner", None),
            tied=get("tie_word_embeddings", True),
            positions=need("n_positions"),
            name=name,
        )
    sizes = dict(
        hidden=need("hidden_size"),
        layers=need("num_hidden_layers"),
        heads=need("num_attention_heads"),
        vocab=need("vocab_size"),
    )
    hidden, heads = sizes["hidden"], sizes["heads"]
    if kind == "opt":
        width = get("word_embed_proj_dim", hidden)
        bias, affine = get("enable_bias", True), get("layer_norm_elementwise_affine", True)
        last = get("do_layer_norm_before", True) and not get("_remove_final_layer_norm", False)
        # With narrower embeddings the tables of tokens and the projections in and out are counted as what differs.
        extra = 0 if width == hidden else sizes["vocab"] * (width - hidden) + 2 * width * hidden
        if extra < 0:
            raise PlanError(
                f"{name}: word_embed_proj_dim={width} of hidden_size={hidden}: such embeddings are not planned for"
            )
        return Model(
            **sizes,
            ffn=need("ffn_dim"),
            tied=get("tie_word_embeddings", True),
            positions=need("max_position_embeddings") + 2,
            qkv_bias=bias,
            out_bias=bias,
            mlp_bias=bias,
            norm=2 if affine else 0,
            final_norm=last,
            extra=extra,
            name=name,
        )
    if kind == "gpt_neox":
        bias = get("attention_bias", True)
        return Model(
            **sizes,
            ffn=need("intermediate_size"),
            tied=get("tie_word_embeddings", False),
            qkv_bias=bias,
            out_bias=bias,
            name=name,
        )
    kv_heads = get("num_key_value_heads", heads)
    head_dim = get("head_dim", family.get("head_dim") or hidden // heads)
    bias = get("attention_bias", False)
    norm, norms = family.get("norm", 1), family.get("norms", 2)
    qk_norm = {None: 0, "head": 2 * head_dim, "all": (heads + kv_heads) * head_dim}[
        family.get("qk_norm")
    ]
    qkv_bias, out_bias = family.get("qkv_bias", bias), bias and kind != "qwen2"
    if kind == "stablelm":
        qkv_bias, out_bias = get("use_qkv_bias", False), False
        norms = 1 if get("use_parallel_residual", False) else 2
        qk_norm = (heads + kv_heads) * head_dim if get("qk_layernorm", False) else 0
    return Model(
        **sizes,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=need("intermediate_size"),
        gated=True,
        tied=get("tie_word_embeddings", family.get("tied", False)),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=get("mlp_bias", False) if kind == "llama" else False,
        norm=norm,
        norms=norms,
        qk_norm=qk_norm,
        name=name,
    )


def load_model(name: str) -> Model:
    """A named model (data/models.json), or the path of a Hugging Face config.json or of the folder that holds one."""
    models = json.loads((DATA / "models.json").read_text())
    if (key := name.lower()) in models:
        entry = models[key]
        return replace(
            from_config(entry["config"], key) if "config" in entry else Model(**entry["sizes"]),
            name=key,
        )
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.exists():
        try:
            return from_config(json.loads(path.read_text()), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} cannot be read: {error}") from None
        except json.JSONDecodeError as error:
            raise PlanError(f"{path} is not JSON: {error}") from None
    raise near("model", name, models)


SIZES = tuple(f.name for f in fields(Model))
