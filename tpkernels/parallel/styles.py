"""Styles: how one module is split. The names are torch's and Hugging Face's where those have one."""

STYLES = {
    "colwise": "nn.Linear or Conv1D by output features; in an attention module by whole heads",
    "colwise_gather_output": "the same by torch.chunk's sizes, its output gathered on every rank",
    "packed_colwise": "[gate; up] fused in one weight: each half by output features",
    "packed_qkv_colwise": "[q; k; v] fused in one weight: each part by whole heads",
    "interleaved_qkv_colwise": "[head, (q, k, v)] fused in one weight: by whole heads",
    "rowwise": "nn.Linear or Conv1D by input features, which arrive split; its output is summed over the ranks",
    "rowwise_split_input": "the same for an input that arrives whole",
    "embedding_rowwise": "nn.Embedding by vocabulary",
    "replicated_with_grad_allreduce": "whole on every rank, applied to the rank's own heads: its gradient is summed over the ranks",
    "replicate": "whole on every rank, applied to whole activations: left as it is",
}
ALIASES = {
    "colwise_rep": "colwise_gather_output",
    "rowwise_rep": "rowwise_split_input",
}  # transformers 4's names
COLUMN = ("colwise", "packed_colwise", "packed_qkv_colwise", "interleaved_qkv_colwise")
ROW = ("rowwise", "rowwise_split_input")


def check_style(pattern: str, style: str) -> str:
    """The style's name without aliases; raises ValueError for an unknown one."""
    style = ALIASES.get(style, style) if isinstance(style, str) else style
    if style not in STYLES:
        raise ValueError(
            f"plan[{pattern!r}] = {style!r} is not a style tpkernels knows: use one of {', '.join(STYLES)}"
        )
    return style
