"""How a model is laid out over GPUs: one row of the planner's table."""

from __future__ import annotations

from dataclasses import dataclass

from .hardware import Hardware
from .model import Model, PlanError, ceil_div, count

RECOMPUTE = ("none", "selective", "full")
# What runs the layout. megatron-2021: attention by three kernels that keep the matrix of scores, dropout, nothing overlapped: what the
# measured A100 rows ran. tpkernels: fused attention and loss, no dropout, all-reduces chunked under GEMMs, gradients reduced under the backward pass.
SOFTWARE = ("megatron-2021", "tpkernels")


@dataclass(frozen=True)
class Layout:
    """TP x PP x DP, and what happens in a step.

    Attributes:
        tp, pp, dp: sizes; their product is the number of GPUs. TP ranks are neighbours, then DP, then PP.
        micro_batch, global_batch: sequences of one pass on one replica, and of a step over all of them.
        interleave: model chunks a pipeline stage holds (1: plain 1F1B).
        recompute: "none", "selective" (attention's core), "full" (a block at a time).
        sequence_parallel: norms, dropout and residual split over the TP ranks too.
        zero: 0 to 3, what the data-parallel ranks share out: nothing, optimizer state, gradients too, parameters too (as FSDP does).
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
        return self.tp * self.pp * self.dp

    @property
    def micro_batches(self) -> int:
        """Passes a replica makes in a step."""
        return self.global_batch // (self.dp * self.micro_batch)

    def blocks(self, model: Model) -> int:
        """Of the fullest stage: its chunks are as long as the longest."""
        return self.interleave * ceil_div(model.layers, self.pp * self.interleave)

    def crosses(self, kind: str, hardware: Hardware) -> bool:
        """Whether ranks that talk in "tp", "dp" or "pp" are on nodes of their own."""
        node = hardware.gpus_per_node
        return {
            "tp": self.tp > node,
            "dp": self.tp * self.dp > node,
            "pp": self.tp * self.dp >= node,
        }[kind]

    def check(self, model: Model, seq: int) -> None:
        """Raises PlanError where the layout is no layout of that model."""
        for name in ("tp", "pp", "dp", "micro_batch", "global_batch", "interleave"):
            count(name, getattr(self, name))
        count("seq", seq)
        if self.recompute not in RECOMPUTE:
            raise PlanError(f"recompute={self.recompute!r} is none of {', '.join(RECOMPUTE)}")
        if isinstance(self.zero, bool) or self.zero not in (0, 1, 2, 3):
            raise PlanError(f"zero={self.zero!r} is none of 0, 1, 2, 3")
        if self.global_batch % (self.dp * self.micro_batch):
            raise PlanError(
                f"global_batch={self.global_batch} is not a multiple of dp * micro_batch = {self.dp} * {self.micro_batch}: "
                f"no whole number of passes"
            )
        if self.tp > model.heads:
            raise PlanError(
                f"tp={self.tp} is more than the model's {model.heads} heads: a rank would have none"
            )
        if self.pp * self.interleave > model.layers:
            raise PlanError(
                f"pp={self.pp} * interleave={self.interleave} is more than the model's {model.layers} blocks"
            )
        if self.interleave > 1 and self.pp == 1:
            raise PlanError(
                f"interleave={self.interleave} needs a pipeline: pp=1 has no stages to interleave"
            )

    def words(self) -> str:
        parts = [f"TP {self.tp}"] + [f"PP {self.pp}"] * (self.pp > 1) + [f"DP {self.dp}"]
        parts += [f"interleave {self.interleave}"] * (self.interleave > 1) + [
            "SP"
        ] * self.sequence_parallel
        parts += [f"ZeRO-{self.zero}"] * (self.zero > 0) + [f"recompute {self.recompute}"] * (
            self.recompute != "none"
        )
        return ", ".join(parts) + f", micro-batch {self.micro_batch}"


@dataclass(frozen=True)
class Job:
    """What is trained, on what: a layout completes it."""

    model: Model
    hardware: Hardware
    seq: int
    dtype: str
    software: str
