"""From what a user says (a model, a GPU, sizes) to a `Job` and its batch; refuses what makes no sense."""

from __future__ import annotations

import math
from dataclasses import replace

from .hardware import Hardware, load_hardware
from .layout import RECOMPUTE, SOFTWARE, Job, Layout
from .model import Model, PlanError, count, near

SEQ = 2048  # tokens of a sequence where nothing says otherwise
VOCAB = 51200


def amount(text: str | int, name: str) -> int:
    """4194304, "4M" (4 * 2**20, as batches are named), "512k": a positive whole number."""
    if isinstance(text, int) and not isinstance(text, bool):
        return count(name, text)
    units = {"k": 2**10, "m": 2**20, "g": 2**30, "": 1}
    text = str(text).strip()
    digits = text.rstrip("kKmMgG")
    try:
        value = float(digits) * units[text[len(digits) :].lower()]
    except (KeyError, ValueError):
        raise PlanError(f"{name}={text!r} is no number: write 4194304 or 4M") from None
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise PlanError(f"{name} must be a whole number of at least 1, got {text!r}")
    return int(value)


def sized_model(
    hidden: int,
    layers: int,
    heads: int,
    vocab: int = VOCAB,
    kv_heads=None,
    ffn=None,
    gated: bool = False,
    seq: int = SEQ,
) -> Model:
    """A GPT (LayerNorm, biases, learned positions, tied output), or, gated, a Llama (RMSNorm, no biases, rotary, untied)."""
    sizes = dict(hidden=hidden, layers=layers, heads=heads, vocab=vocab, kv_heads=kv_heads, ffn=ffn)
    if gated:
        if ffn is None:
            sizes["ffn"] = (
                -(-8 * hidden // 3 // 256) * 256
            )  # two thirds of 4 hidden, to a multiple of 256, as Llama's
        return Model(**sizes, gated=True, qkv_bias=False, out_bias=False, mlp_bias=False, norm=1)
    return Model(**sizes, positions=seq, tied=True)


def make_job(
    model: Model,
    gpu: str,
    seq: int | None,
    *,
    dtype=None,
    software=None,
    gpus_per_node=None,
    network_gbit=None,
) -> Job:
    hardware: Hardware = load_hardware(gpu)
    if gpus_per_node is not None:
        hardware = replace(hardware, gpus_per_node=count("gpus_per_node", gpus_per_node))
    if network_gbit is not None:
        if not 0 < network_gbit < math.inf:
            raise PlanError(
                f"network_gbit must be positive, got {network_gbit!r}: Gbit/s of each GPU's share of the node's ports"
            )
        network = replace(
            hardware.network,
            kind=f"{network_gbit:g} Gbit/s a GPU",
            bus_bytes_per_s=network_gbit / 8 * 1e9,
        )
        hardware = replace(hardware, network=network)
    dtype = dtype or hardware.half
    hardware.peak(dtype)
    software = software or "tpkernels"
    if software not in SOFTWARE:
        raise near("software", software, SOFTWARE)
    return Job(model, hardware, count("seq", SEQ if seq is None else seq), dtype, software)


def sequences(seq: int, batch_tokens=None, global_batch=None) -> int:
    """Of a step, from either way to say it.

    Raises:
        PlanError: neither or both are given, or fewer tokens than a sequence has.
    """
    if (batch_tokens is None) == (global_batch is None):
        raise PlanError(
            "pass one of batch_tokens (tokens of a step) and global_batch (sequences of a step)"
        )
    if global_batch is not None:
        return amount(global_batch, "global_batch")
    tokens = amount(batch_tokens, "batch_tokens")
    if tokens < seq:
        raise PlanError(
            f"batch_tokens={tokens} is less than a sequence of seq={seq}: pass more, or a smaller seq"
        )
    return tokens // seq


_LAYOUT_KEYS = {
    "tp": int,
    "pp": int,
    "dp": int,
    "micro-batch": int,
    "interleave": int,
    "recompute": str,
    "sp": bool,
    "zero": int,
}


def parse_layout(text: str, gpus: int | None, global_batch: int) -> Layout:
    """ "tp=8,pp=2,sp,zero=1,micro-batch=2,recompute=full"; dp is what `gpus` leaves if it is not said."""
    values: dict = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        key, has_value, value = part.partition("=")
        key = key.lower().replace("_", "-")
        if key not in _LAYOUT_KEYS:
            raise near("part of a layout", key, _LAYOUT_KEYS)
        kind = _LAYOUT_KEYS[key]
        if kind is bool:
            values["sequence_parallel"] = (
                value.lower() not in ("0", "no", "false") if has_value else True
            )
            continue
        try:
            values[key.replace("-", "_")] = kind(value)
        except ValueError:
            raise PlanError(f"layout {text!r}: {key}={value!r} is no whole number") from None
    if "recompute" in values and values["recompute"] not in RECOMPUTE:
        raise near("way to recompute", values["recompute"], RECOMPUTE)
    if "dp" not in values and gpus is not None:
        others = values.get("tp", 1) * values.get("pp", 1)
        if others < 1 or gpus % others:
            raise PlanError(
                f"layout {text!r}: {gpus} GPUs are not a multiple of tp * pp = {others}"
            )
        values["dp"] = gpus // others
    layout = Layout(**values, global_batch=global_batch)
    if gpus is not None and layout.gpus != gpus:
        raise PlanError(f"layout {text!r} is one of {layout.gpus} GPUs, not of {gpus}")
    return layout
