"""Styles: how one module is sharded, and which style a plan gives to each module.

The names are torch's and Hugging Face's where they have one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from torch import nn

STYLES = {
    "colwise": "nn.Linear or Conv1D by output features; in an attention module by whole heads",
    "colwise_gather_output": "the same by torch.chunk's sizes, its output gathered on every rank",
    "packed_colwise": "[gate; up] fused in one weight: each half by output features",
    "packed_qkv_colwise": "[q; k; v] fused in one weight: each part by whole heads",
    "interleaved_qkv_colwise": "[head, (q, k, v)] fused in one weight: by whole heads",
    "rowwise": "nn.Linear or Conv1D by input features, which arrive sharded; its output is summed "
    "over the ranks",
    "rowwise_split_input": "the same for an input that arrives full",
    "embedding_rowwise": "nn.Embedding by vocabulary",
    "replicated_with_grad_allreduce": "full on every rank, applied to the rank's own heads: its "
    "gradient is summed over the ranks",
    "replicate": "full on every rank, applied to full activations: left as it is",
}
# transformers 4's names
ALIASES = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise_split_input"}
COLUMN = ("colwise", "packed_colwise", "packed_qkv_colwise", "interleaved_qkv_colwise")
ROW = ("rowwise", "rowwise_split_input")


def check_style(pattern: str, style: str) -> str:
    """Return the style's name without aliases.

    Raises:
        ValueError: the style of plan[pattern] is unknown.
    """
    style = ALIASES.get(style, style) if isinstance(style, str) else style
    if style not in STYLES:
        raise ValueError(
            f"plan[{pattern!r}] = {style!r} is not a style tpkernels knows: "
            f"use one of {', '.join(STYLES)}"
        )
    return style


def matches(pattern: str, name: str) -> bool:
    """Return True if a module's name matches: `*` stands for one part of the dotted name.

    Example:
        >>> matches("layers.*.mlp", "layers.0.mlp"), matches("layers.*", "layers.0.mlp")
        (True, False)
    """
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), name) is not None


def match_plan(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Return module name -> style. A later entry of the plan overrides an earlier one.

    Raises:
        ValueError: a pattern that matches nothing, an unknown style.
    """
    styles: dict[str, str] = {}
    names = [name for name, _ in model.named_modules()]
    for pattern, style in plan.items():
        style = check_style(pattern, style)
        found = [name for name in names if matches(pattern, name)]
        if not found:
            candidates = [re.sub(r"\.\d+\.", ".*.", name) for name in names]
            near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.5)
            hint = f": near names are {', '.join(dict.fromkeys(near))}" if near else ""
            raise ValueError(f"plan[{pattern!r}] matches no module of {type(model).__name__}{hint}")
        styles.update(dict.fromkeys(found, style))
    return styles
