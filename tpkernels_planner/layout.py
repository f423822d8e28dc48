"""Layouts: how a model is distributed over GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import PlanError, unknown_name, whole_number
from .hardware import Hardware
from .model import Model, ceil_div

RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Layout:
    """TP x PP x DP, and the options of a step.

    Attributes:
        tp, pp, dp: sizes; their product is the number of GPUs. TP ranks are neighbours, then DP
            ranks, then PP stages.
        micro_batch: sequences of one pass on one replica.
        global_batch: sequences of a step over all replicas.
        interleave: model chunks of a pipeline stage (1: plain 1F1B).
        recompute: "none", "selective" (attention's core) or "full" (a block at a time).
        sequence_parallel: the TP ranks shard norms, dropout and residual too.
        zero: the ZeRO stage. 0: data-parallel ranks shard nothing; 1: the optimizer's state; 2:
            gradients too; 3: parameters too, as FSDP does.

    Example:
        >>> from tpkernels_planner import Layout
        >>> layout = Layout(tp=8, dp=4, global_batch=64, zero=1)
        >>> layout.gpus, layout.micro_batches, layout.words()
        (32, 16, 'TP 8, DP 4, ZeRO-1, micro-batch 1')
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    micro_batch: int = 1
    global_batch: int = 1
    interleave: int = 1
    recompute: str = "none"
    sequence_parallel: bool = False
    zero: int = 0

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.tp * self.pp * self.dp

    @property
    def micro_batches(self) -> int:
        """Passes that a replica makes in a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    def blocks(self, model: Model) -> int:
        """Count the blocks of the fullest stage, all of whose chunks are as long as the longest."""
        return self.interleave * ceil_div(model.layers, self.pp * self.interleave)

    def crosses(self, kind: str, hardware: Hardware) -> bool:
        """Tell if the "tp", "dp" or "pp" ranks that communicate are on several nodes."""
        node = hardware.gpus_per_node
        return {
            "tp": self.tp > node,
            "dp": self.tp * self.dp > node,
            "pp": self.tp * self.dp >= node,
        }[kind]

    def check(self, model: Model, seq: int) -> None:
        """Check that the layout is possible for a model and sequences of `seq` tokens.

        Raises:
            PlanError: it is not.
        """
        for name in ("tp", "pp", "dp", "micro_batch", "global_batch", "interleave"):
            whole_number(name, getattr(self, name))
        whole_number("seq", seq)
        if self.recompute not in RECOMPUTE:
            raise PlanError(f"recompute={self.recompute!r} is none of {', '.join(RECOMPUTE)}")
        if isinstance(self.zero, bool) or self.zero not in (0, 1, 2, 3):
            raise PlanError(f"zero={self.zero!r} is none of 0, 1, 2, 3")
        if self.global_batch % (self.dp * self.micro_batch):
            raise PlanError(
                f"global_batch={self.global_batch} is not a multiple of dp * micro_batch = "
                f"{self.dp} * {self.micro_batch}: no whole number of passes"
            )
        if self.tp > model.heads:
            raise PlanError(
                f"tp={self.tp} is more than the model's {model.heads} heads: a rank would have none"
            )
        if self.pp * self.interleave > model.layers:
            raise PlanError(
                f"pp={self.pp} * interleave={self.interleave} is more than the model's "
                f"{model.layers} blocks"
            )
        if self.interleave > 1 and self.pp == 1:
            raise PlanError(
                f"interleave={self.interleave} needs a pipeline: pp=1 has no stages to interleave"
            )

    def words(self) -> str:
        """Describe the layout in words; options that are off are left out."""
        parts = [f"TP {self.tp}"]
        if self.pp > 1:
            parts.append(f"PP {self.pp}")
        parts.append(f"DP {self.dp}")
        if self.interleave > 1:
            parts.append(f"interleave {self.interleave}")
        if self.sequence_parallel:
            parts.append("SP")
        if self.zero > 0:
            parts.append(f"ZeRO-{self.zero}")
        if self.recompute != "none":
            parts.append(f"recompute {self.recompute}")
        return ", ".join([*parts, f"micro-batch {self.micro_batch}"])


_KEYS = {
    "tp": int,
    "pp": int,
    "dp": int,
    "micro-batch": int,
    "interleave": int,
    "recompute": str,
    "sp": bool,
    "zero": int,
}


def _parse_part(part: str, text: str) -> tuple[str, Any]:
    """Parse "key=value", or "sp" alone, of the layout `text`."""
    key, has_value, value = part.partition("=")
    key = key.lower().replace("_", "-")
    if key not in _KEYS:
        raise unknown_name("part of a layout", key, _KEYS)
    if _KEYS[key] is bool:
        return "sequence_parallel", not has_value or value.lower() not in ("0", "no", "false")
    try:
        return key.replace("-", "_"), _KEYS[key](value)
    except ValueError:
        raise PlanError(f"layout {text!r}: {key}={value!r} is no whole number") from None


def parse_layout(text: str, gpus: int | None, global_batch: int) -> Layout:
    """Parse a layout such as "tp=8,pp=2,sp,zero=1,micro-batch=2,recompute=full".

    Args:
        text: the layout. Without dp it is as large as `gpus` allows.
        gpus: the number of GPUs that it must have; None: any.
        global_batch: sequences of a step.

    Raises:
        PlanError: an unknown key or value, or another number of GPUs.

    Example:
        >>> parse_layout("tp=4,sp", gpus=16, global_batch=8).words()
        'TP 4, DP 4, SP, micro-batch 1'
    """
    values: dict[str, Any] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, value = _parse_part(part, text)
        values[name] = value
    if "recompute" in values and values["recompute"] not in RECOMPUTE:
        raise unknown_name("way to recompute", values["recompute"], RECOMPUTE)
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
