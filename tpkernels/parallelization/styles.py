"""Styles: how one module is sharded.

The names are torch's and Hugging Face's where they have one.
"""

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
