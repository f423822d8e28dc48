"""Plans: module-name patterns -> styles."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from torch import nn

from .styles import check_style

# For families whose own plan is empty or gathers activations; names within the base model, then those of the heads.
_GPT2 = {
    "wte": "embedding_rowwise",
    "h.*.attn.c_attn": "packed_qkv_colwise",
    "h.*.attn.c_proj": "rowwise",
    "h.*.mlp.c_fc": "colwise",
    "h.*.mlp.c_proj": "rowwise",
}
_GPT_NEOX = {
    "embed_in": "embedding_rowwise",
    "layers.*.attention.query_key_value": "interleaved_qkv_colwise",
    "layers.*.attention.dense": "rowwise",
    "layers.*.mlp.dense_h_to_4h": "colwise",
    "layers.*.mlp.dense_4h_to_h": "rowwise",
}
_PHI3 = {
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.qkv_proj": "packed_qkv_colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_up_proj": "packed_colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
_OPT = {
    "decoder.embed_tokens": "embedding_rowwise",
    "decoder.layers.*.self_attn.q_proj": "colwise",
    "decoder.layers.*.self_attn.k_proj": "colwise",
    "decoder.layers.*.self_attn.v_proj": "colwise",
    "decoder.layers.*.self_attn.out_proj": "rowwise",
    "decoder.layers.*.fc1": "colwise",
    "decoder.layers.*.fc2": "rowwise",
    "decoder.layers.*.self_attn_layer_norm": "replicate",
    "decoder.layers.*.final_layer_norm": "replicate",
}
_STABLELM = {
    "embed_tokens": "embedding_rowwise",
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
FAMILIES = {"gpt2": _GPT2, "gpt_neox": _GPT_NEOX, "phi3": _PHI3, "stablelm": _STABLELM, "opt": _OPT}


def auto_plan(model: nn.Module) -> dict[str, str]:
    """The plan for a Hugging Face model: tpkernels' own for some families, otherwise the one the model carries (`_tp_plan`).

    A dict to pass on as it is, or extended: `{**auto_plan(model), "model.layers.0.mlp.up_proj": "replicate"}`.

    Raises:
        ValueError: the model carries no plan and tpkernels has none for its family.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    names = {module: name for name, module in model.named_modules()}
    if family in FAMILIES:
        prefix = getattr(model, "base_model_prefix", "")
        prefix = f"{prefix}." if prefix and hasattr(model, prefix) else ""
        plan = {prefix + pattern: style for pattern, style in FAMILIES[family].items()}
        if head is not None:
            plan[names[head]] = "colwise_gather_output"
    else:
        plan = dict(getattr(model, "_tp_plan", None) or {})
    if not plan:
        raise ValueError(
            f"plan='auto': {type(model).__name__} carries no tensor-parallel plan (model._tp_plan) and tpkernels has none for it "
            f"(it has {', '.join(FAMILIES)}): pass plan={{name pattern: style}}"
        )
    plan = {
        pattern: style
        for pattern, style in plan.items()
        if any(matches(pattern, name) for name in names.values())
    }
    # Tied tables are split alike, or not at all.
    table = model.get_input_embeddings() if head is not None else None
    if table is not None and head.weight is table.weight:
        styles = match_plan(model, plan)
        if names[table] in styles or names[head] in styles:
            plan.setdefault(names[table], "embedding_rowwise")
            plan.setdefault(names[head], "colwise_gather_output")
    return plan


def matches(pattern: str, name: str) -> bool:
    """Whether a module's name matches: `*` stands for one part of the dotted name."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), name) is not None


def match_plan(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Module name -> style. A later entry of the plan overrides an earlier one.

    Raises:
        ValueError: a pattern that matches nothing, an unknown style.
    """
    styles: dict[str, str] = {}
    names = [name for name, _ in model.named_modules()]
    for pattern, style in plan.items():
        style = check_style(pattern, style)
        found = [name for name in names if matches(pattern, name)]
        if not found:
            near = difflib.get_close_matches(
                pattern, [re.sub(r"\.\d+\.", ".*.", name) for name in names], n=3, cutoff=0.5
            )
            raise ValueError(
                f"plan[{pattern!r}] matches no module of {type(model).__name__}"
                + (f": near names are {', '.join(dict.fromkeys(near))}" if near else "")
            )
        styles.update(dict.fromkeys(found, style))
    return styles
