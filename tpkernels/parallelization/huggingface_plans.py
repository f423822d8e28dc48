"""auto_plan: the plan that a Hugging Face model carries, or one of ours for its family."""

from __future__ import annotations

from typing import Any

from torch import nn

from .styles import match_plan, matches

# Families whose own plan is empty or gathers activations. Names are within the base model.
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
_FAMILY_PLANS = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "phi3": _PHI3,
    "stablelm": _STABLELM,
    "opt": _OPT,
}


def auto_plan(model: Any) -> dict[str, str]:
    """Return the plan of a Hugging Face model.

    It is tpkernels' own for some families, otherwise the one the model carries (`_tp_plan`). The
    dict can be passed on as it is, or extended:
    `{**auto_plan(model), "model.layers.0.mlp.up_proj": "replicate"}`.

    Args:
        model: a transformers model.

    Returns:
        Module-name pattern -> style.

    Raises:
        ValueError: the model carries no plan and tpkernels has none for its family.

    Example:
        >>> plan = tpk.auto_plan(model)  # doctest: +SKIP
        >>> plan["model.layers.*.self_attn.o_proj"]  # doctest: +SKIP
        'rowwise'
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    head: Any = None
    if hasattr(model, "get_output_embeddings"):
        head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if family in _FAMILY_PLANS:
        plan = _family_plan(model, family)
        if head is not None:
            plan[names[head]] = "colwise_gather_output"
    else:
        plan = dict(getattr(model, "_tp_plan", None) or {})
    if not plan:
        raise ValueError(
            f"plan='auto': {type(model).__name__} carries no tensor-parallel plan "
            f"(model._tp_plan) and tpkernels has none for it (it has {', '.join(_FAMILY_PLANS)}): "
            "pass plan={name pattern: style}"
        )
    plan = {
        pattern: style
        for pattern, style in plan.items()
        if any(matches(pattern, name) for name in names.values())
    }
    # A tied embedding and head are sharded alike, or not at all.
    embedding = model.get_input_embeddings() if head is not None else None
    if head is not None and embedding is not None and head.weight is embedding.weight:
        styles = match_plan(model, plan)
        if names[embedding] in styles or names[head] in styles:
            plan.setdefault(names[embedding], "embedding_rowwise")
            plan.setdefault(names[head], "colwise_gather_output")
    return plan


def _family_plan(model: nn.Module, family: str) -> dict[str, str]:
    """Return our plan for a family, with the names that it has in `model`."""
    base_name = getattr(model, "base_model_prefix", "")
    prefix = f"{base_name}." if base_name and hasattr(model, base_name) else ""
    return {prefix + pattern: style for pattern, style in _FAMILY_PLANS[family].items()}
