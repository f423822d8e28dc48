"""Models by name, by sizes, or from a Hugging Face configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import PlanError, unknown_name, whole_number
from .model import DATA, Model, ceil_div

SEQ = 2048  # tokens of a sequence by default
VOCAB = 51200

# The defaults of transformers' configurations by model_type, where `from_config` has others.
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


class _Config:
    """The keys of a configuration, which is called `name` in errors."""

    def __init__(self, keys: dict[str, Any], name: str, kind: str):
        self.keys = keys
        self.name = name
        self.kind = kind

    def need(self, key: str) -> int:
        """Return a size that the configuration must have."""
        if self.keys.get(key) is None:
            raise PlanError(f"{self.name} has no key {key!r}, which a {self.kind} model needs")
        return whole_number(f"{self.name}: {key}", self.keys[key])

    def get(self, key: str, default: Any) -> Any:
        """Return a value; a key that is null has the default."""
        value = self.keys.get(key)
        return default if value is None else value

    def sizes(self) -> dict[str, Any]:
        """Return the sizes that most families name alike."""
        return dict(
            hidden=self.need("hidden_size"),
            layers=self.need("num_hidden_layers"),
            heads=self.need("num_attention_heads"),
            vocab=self.need("vocab_size"),
            name=self.name,
        )


def _gpt2(config: _Config) -> Model:
    return Model(
        config.need("n_embd"),
        config.need("n_layer"),
        config.need("n_head"),
        config.need("vocab_size"),
        ffn=config.get("n_inner", None),
        tied=config.get("tie_word_embeddings", True),
        positions=config.need("n_positions"),
        name=config.name,
    )


def _opt(config: _Config) -> Model:
    sizes = config.sizes()
    hidden = sizes["hidden"]
    vocab = sizes["vocab"]
    width = config.get("word_embed_proj_dim", hidden)
    bias = config.get("enable_bias", True)
    affine = config.get("layer_norm_elementwise_affine", True)
    norm_first = config.get("do_layer_norm_before", True)
    extra = 0
    if width != hidden:
        # Narrower embeddings are counted as hidden wide; `extra` is the difference, with the
        # projections in and out.
        extra = vocab * (width - hidden) + 2 * width * hidden
    if extra < 0:
        raise PlanError(
            f"{config.name}: word_embed_proj_dim={width} of hidden_size={hidden}: "
            "such embeddings are not planned for"
        )
    return Model(
        **sizes,
        ffn=config.need("ffn_dim"),
        tied=config.get("tie_word_embeddings", True),
        positions=config.need("max_position_embeddings") + 2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        norm=2 if affine else 0,
        final_norm=norm_first and not config.get("_remove_final_layer_norm", False),
        extra=extra,
    )


def _gpt_neox(config: _Config) -> Model:
    sizes = config.sizes()
    bias = config.get("attention_bias", True)
    return Model(
        **sizes,
        ffn=config.need("intermediate_size"),
        tied=config.get("tie_word_embeddings", False),
        qkv_bias=bias,
        out_bias=bias,
    )


def _llama_like(config: _Config) -> Model:
    sizes = config.sizes()
    hidden = sizes["hidden"]
    heads = sizes["heads"]
    kind = config.kind
    family = _FAMILIES[config.kind]
    kv_heads = config.get("num_key_value_heads", heads)
    head_dim = config.get("head_dim", family.get("head_dim") or hidden // heads)
    bias = config.get("attention_bias", False)
    qkv_bias = family.get("qkv_bias", bias)
    out_bias = bias and kind != "qwen2"
    norms = family.get("norms", 2)
    every_head = (heads + kv_heads) * head_dim
    qk_norm = {None: 0, "head": 2 * head_dim, "all": every_head}[family.get("qk_norm")]
    if kind == "stablelm":
        qkv_bias = config.get("use_qkv_bias", False)
        out_bias = False
        norms = 1 if config.get("use_parallel_residual", False) else 2
        qk_norm = every_head if config.get("qk_layernorm", False) else 0
    return Model(
        **sizes,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=config.need("intermediate_size"),
        gated=True,
        tied=config.get("tie_word_embeddings", family.get("tied", False)),
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        mlp_bias=kind == "llama" and config.get("mlp_bias", False),
        norm=family.get("norm", 1),
        norms=norms,
        qk_norm=qk_norm,
    )


_READERS = {"gpt2": _gpt2, "opt": _opt, "gpt_neox": _gpt_neox}


def from_config(config: dict[str, Any], name: str = "config.json") -> Model:
    """Read a Hugging Face config.json of a family that `tpk.parallelize` shards.

    Args:
        config: the file's keys.
        name: the file's name in errors.

    Raises:
        PlanError: another family, a mixture of experts, a missing key (named), or sizes that do
            not fit.

    Example:
        >>> keys = dict(model_type="gpt2", n_embd=768, n_layer=12, n_head=12, vocab_size=50257)
        >>> from_config({**keys, "n_positions": 1024}).parameters
        124439808
    """
    if not isinstance(config, dict):
        raise PlanError(f"{name} is not the configuration of a model: it holds no object of keys")
    if "text_config" in config and "hidden_size" not in config:
        config = config["text_config"]
    kind = config.get("model_type")
    if kind is None:
        raise PlanError(f"{name} has no key 'model_type'")
    if kind not in _FAMILIES:
        raise unknown_name("model family that the planner knows", str(kind), _FAMILIES)
    return _READERS.get(kind, _llama_like)(_Config(config, name, kind))


def load_model(name: str) -> Model:
    """Load a model by its name in data/models.json or by a path.

    Args:
        name: a name, or the path of a Hugging Face config.json or of the folder that holds one.

    Raises:
        PlanError: no such name (with those near it), or a file that does not describe a model.

    Example:
        >>> from tpkernels_planner import load_model
        >>> load_model("llama-70b").kv_heads
        8
    """
    models = json.loads((DATA / "models.json").read_text())
    key = name.lower()
    if key in models:
        entry = models[key]
        model = from_config(entry["config"], key) if "config" in entry else Model(**entry["sizes"])
        return replace(model, name=key)
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix != ".json" and not path.exists():
        raise unknown_name("model", name, models)
    try:
        return from_config(json.loads(path.read_text()), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise PlanError(f"{path} is not JSON: {error}") from None


def gpt_model(
    hidden: int,
    layers: int,
    heads: int,
    vocab: int = VOCAB,
    kv_heads: int | None = None,
    ffn: int | None = None,
    positions: int = SEQ,
) -> Model:
    """Make a GPT: LayerNorm, biases, learned positions, a tied output layer."""
    sizes: dict[str, Any] = dict(kv_heads=kv_heads, ffn=ffn, positions=positions)
    return Model(hidden, layers, heads, vocab, tied=True, **sizes)


def llama_model(
    hidden: int,
    layers: int,
    heads: int,
    vocab: int = VOCAB,
    kv_heads: int | None = None,
    ffn: int | None = None,
) -> Model:
    """Make a Llama: a gated MLP, RMSNorm, no biases, rotary positions, its own output layer.

    `ffn` is two thirds of 4 hidden by default, rounded up to a multiple of 256, as Llama's is.
    """
    if ffn is None:
        ffn = ceil_div(8 * hidden // 3, 256) * 256
    biases = dict(qkv_bias=False, out_bias=False, mlp_bias=False)
    sizes: dict[str, Any] = dict(kv_heads=kv_heads, ffn=ffn)
    return Model(hidden, layers, heads, vocab, gated=True, norm=1, **biases, **sizes)
