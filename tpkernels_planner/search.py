"""Every layout of a model on a number of GPUs, the fastest that fits first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .constants import Constants, constants_of
from .errors import PlanError, whole_number
from .job import Job
from .layout import Layout
from .memory import Memory, memory
from .model import ceil_div
from .step_time import StepTime, step_time

FIT = 0.92  # usable share of a GPU's memory; the driver and fragments take the rest


def usable_bytes(job: Job) -> float:
    """Return the bytes of a GPU's memory that a layout may use."""
    return FIT * job.hardware.memory_bytes


def hardware_share(job: Job, layout: Layout) -> float:
    """Return the GPUs' operations, recomputation included, as a share of the model's own."""
    model = job.model
    seq = job.seq
    recomputed = 0
    if layout.recompute == "full":
        recomputed = model.forward_flops(seq) - 2 * seq * model.vocab * model.hidden
    elif layout.recompute == "selective" and job.is_megatron:
        recomputed = 4 * seq * seq * model.query_features * model.layers
    return 1 + recomputed / model.step_flops(seq)


@dataclass(frozen=True)
class Prediction:
    """One layout of a job, with the time and the memory of its step.

    Example:
        >>> from tpkernels_planner import plan
        >>> best = plan("llama-7b", gpus=8, global_batch=64).best
        >>> best.layout.words(), round(best.step_s, 2), round(best.memory.total / 1e9)
        ('TP 1, DP 8, ZeRO-2, micro-batch 4', 1.38, 63)
    """

    job: Job
    layout: Layout
    time: StepTime
    memory: Memory

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.time.total

    @property
    def fits(self) -> bool:
        """The fullest GPU has enough memory."""
        return self.memory.total <= usable_bytes(self.job)

    @property
    def tokens_per_s(self) -> float:
        """Tokens that all GPUs train on in a second."""
        return self.layout.global_batch * self.job.seq / self.step_s

    @property
    def step_flops(self) -> int:
        """Operations of the model in a step, without recomputation."""
        return self.layout.global_batch * self.job.model.step_flops(self.job.seq)

    @property
    def flops_per_gpu(self) -> float:
        """Operations of the model that a GPU does in a second, without recomputation."""
        return self.step_flops / (self.step_s * self.layout.gpus)

    @property
    def hardware_flops_per_gpu(self) -> float:
        """Operations that a GPU does in a second, recomputation included."""
        return self.flops_per_gpu * hardware_share(self.job, self.layout)

    @property
    def mfu(self) -> float:
        """Model FLOP/s utilization: `flops_per_gpu` over the GPU's peak."""
        return self.flops_per_gpu / self.job.peak_flops_per_s


def predict_unchecked(job: Job, layout: Layout, constants: Constants) -> Prediction:
    """Predict a layout that is known to be possible for the job's model."""
    return Prediction(job, layout, step_time(job, layout, constants), memory(job, layout))


def predict(job: Job, layout: Layout, constants: Constants | None = None) -> Prediction:
    """Predict the time and the memory of one layout.

    Args:
        job, layout: the job and its layout.
        constants: other constants than the GPU's own.

    Raises:
        PlanError: the layout is not possible for the job's model.

    Example:
        >>> from tpkernels_planner import Layout, load_model, make_job, predict
        >>> job = make_job(load_model("llama-7b"), "h100", seq=2048)
        >>> predict(job, Layout(tp=8, global_batch=8)).fits
        True
    """
    layout.check(job.model, job.seq)
    return predict_unchecked(job, layout, constants or constants_of(job.hardware))


def _divisors(n: int, most: int | None = None) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    every = sorted({*small, *(n // d for d in small)})
    return [d for d in every if most is None or d <= most]


def _divides_blocks(layers: int, chunks: int) -> bool:
    """Tell if as many chunks hold all blocks and have room for a tenth more at most."""
    return chunks <= layers and ceil_div(layers, chunks) * chunks <= 1.1 * layers


def _sizes(
    job: Job, gpus: int, global_batch: int, most_pp: int | None
) -> Iterator[tuple[int, int, int]]:
    """Yield the (tp, pp, dp) whose DP divides the batch and whose PP about divides the blocks."""
    layers = job.model.layers
    for tp in _divisors(gpus, min(job.hardware.gpus_per_node, job.model.heads)):
        for pp in _divisors(gpus // tp, layers if most_pp is None else min(layers, most_pp)):
            dp = gpus // (tp * pp)
            if global_batch % dp == 0 and _divides_blocks(layers, pp):
                yield tp, pp, dp


def _interleaves(layers: int, pp: int, passes: int) -> list[int]:
    """List the chunks that a stage may have; the pipeline must divide the passes for several."""
    if pp == 1 or passes % pp:
        return [1]
    return [1, *(v for v in range(2, 9) if _divides_blocks(layers, pp * v))]


def _zero_stages(pp: int, dp: int) -> tuple[int, ...]:
    if dp == 1:
        return (0,)
    if pp > 1:
        return (0, 1)
    return (0, 1, 2, 3)


def layouts(job: Job, gpus: int, global_batch: int, most_pp: int | None = None) -> Iterator[Layout]:
    """Yield the layouts that the planner compares.

    TP stays inside a node, PP divides the blocks up to a tenth, and DP has the other GPUs.

    Args:
        job: the job.
        gpus: number of GPUs.
        global_batch: sequences of a step.
        most_pp: most pipeline stages; None: any.
    """
    recomputes = ("none", "selective", "full") if job.is_megatron else ("none", "full")
    for tp, pp, dp in _sizes(job, gpus, global_batch, most_pp):
        batch = global_batch // dp
        for micro_batch in (size for size in (1, 2, 4, 8, 16, 32) if batch % size == 0):
            interleaves = _interleaves(job.model.layers, pp, batch // micro_batch)
            options = itertools.product(
                (False, True) if tp > 1 else (False,),
                recomputes,
                interleaves,
                _zero_stages(pp, dp),
            )
            for sequence_parallel, recompute, interleave, zero in options:
                yield Layout(
                    tp,
                    pp,
                    dp,
                    micro_batch,
                    global_batch,
                    interleave,
                    recompute,
                    sequence_parallel,
                    zero,
                )


@dataclass(frozen=True)
class LayoutChoice:
    """The predictions of a search. `tpk.init_mesh` takes it as the layout of its first one.

    Attributes:
        job, gpus, global_batch: the job, its number of GPUs, and the sequences of a step.
        rows: the layouts that fit, the fastest first.
        too_large: the layouts that do not fit, the smallest first.

    Example:
        >>> from tpkernels_planner import plan
        >>> choice = plan("llama-7b", gpus=8, global_batch=64)
        >>> choice.tp, choice.pp, choice.dp
        (1, 1, 8)
        >>> choice.first(lambda layout: layout.tp == 4).layout.words()
        'TP 4, DP 2, SP, ZeRO-1, micro-batch 16'
    """

    job: Job
    gpus: int
    global_batch: int
    rows: tuple[Prediction, ...]
    too_large: tuple[Prediction, ...]

    @property
    def best(self) -> Prediction:
        """The fastest layout that fits."""
        return self.rows[0]

    @property
    def tp(self) -> int:
        """TP ranks of the best layout."""
        return self.best.layout.tp

    @property
    def pp(self) -> int:
        """Pipeline stages of the best layout."""
        return self.best.layout.pp

    @property
    def dp(self) -> int:
        """Data-parallel ranks of the best layout."""
        return self.best.layout.dp

    def first(self, wanted: Callable[[Layout], bool]) -> Prediction | None:
        """Return the fastest prediction whose layout is wanted, or None."""
        return next((row for row in self.rows if wanted(row.layout)), None)


def search(job: Job, gpus: int, global_batch: int, most_pp: int | None = None) -> LayoutChoice:
    """Predict every layout of a job on a number of GPUs.

    Args:
        job: the job.
        gpus: number of GPUs.
        global_batch: sequences of a step.
        most_pp: most pipeline stages; None: any.

    Raises:
        PlanError: no layout exists, or none fits; the message says by how much, and what would.

    Example:
        >>> from tpkernels_planner import load_model, make_job, search
        >>> job = make_job(load_model("llama-7b"), "h100", seq=2048)
        >>> search(job, gpus=8, global_batch=64).best.layout.zero
        2
    """
    whole_number("gpus", gpus)
    whole_number("global_batch", global_batch)
    if most_pp is not None:
        whole_number("max_pp", most_pp)
    constants = constants_of(job.hardware)
    rows = [
        predict_unchecked(job, layout, constants)
        for layout in layouts(job, gpus, global_batch, most_pp)
    ]
    if not rows:
        node = job.hardware.gpus_per_node
        raise PlanError(
            f"{gpus} GPUs cannot share {global_batch} sequences: no TP (of at most {node}) x PP x "
            "DP of them has a DP that divides the batch; "
            f"pass a multiple of {gpus // _divisors(gpus, node)[-1]} sequences"
        )
    fitting = sorted(
        (row for row in rows if row.fits), key=lambda row: (row.step_s, row.memory.total)
    )
    larger = sorted((row for row in rows if not row.fits), key=lambda row: row.memory.total)
    if not fitting:
        raise PlanError(_advise_more_memory(larger[0], most_pp))
    return LayoutChoice(job, gpus, global_batch, tuple(fitting), tuple(larger))


def _advise_more_memory(smallest: Prediction, most_pp: int | None) -> str:
    """Say what would fit: more GPUs, or larger ones than the smallest layout's."""
    job = smallest.job
    layout = smallest.layout
    usable = usable_bytes(job)
    needed = smallest.memory.total
    text = (
        f"no layout of {layout.gpus} {job.hardware.name} fits: the smallest ({layout.words()}) "
        f"takes {needed / 1e9:.1f} GB a GPU, {(needed - usable) / 1e9:.1f} GB more than the "
        f"{usable / 1e9:.1f} GB it may"
    )
    larger = f"{needed / FIT / 1e9:.0f} GB each"
    more = layout.gpus
    while more < 16384:
        more *= 2
        batch = ceil_div(layout.global_batch, more) * more
        candidates = layouts(job, more, batch, most_pp)
        if any(memory(job, candidate).total <= usable for candidate in candidates):
            return f"{text}; {more} GPUs would do, or as many of {larger}"
    return f"{text}; GPUs of {larger} would do"
