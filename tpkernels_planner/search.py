"""Every layout of a model on a number of GPUs, the fastest that fits first, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .layout import Job, Layout
from .memory import Memory, memory
from .model import PlanError, ceil_div, count
from .time import Constants, StepTime, constants_of, step_time

FIT = 0.92  # of a GPU's memory: the rest the driver and fragments take


def hardware_share(job: Job, layout: Layout) -> float:
    """Operations that the GPUs do, recomputation included, as a share of the model's own."""
    model, seq = job.model, job.seq
    blocks = model.forward_flops(seq) - 2 * seq * model.vocab * model.hidden
    core = 4 * seq * seq * model.attention * model.layers if job.software == "megatron-2021" else 0
    return 1 + {"none": 0, "selective": core, "full": blocks}[layout.recompute] / model.step_flops(
        seq
    )


@dataclass(frozen=True)
class Row:
    """One layout with its prediction."""

    job: Job
    layout: Layout
    time: StepTime
    memory: Memory

    @property
    def step_s(self) -> float:
        return self.time.total

    @property
    def fits(self) -> bool:
        return self.memory.total <= FIT * self.job.hardware.memory_bytes

    @property
    def tokens_per_s(self) -> float:
        return self.layout.global_batch * self.job.seq / self.step_s

    @property
    def flops_per_gpu(self) -> float:
        """The model's own, a second."""
        return (
            self.layout.global_batch
            * self.job.model.step_flops(self.job.seq)
            / (self.step_s * self.layout.gpus)
        )

    @property
    def hardware_flops_per_gpu(self) -> float:
        """What was recomputed counts too."""
        return self.flops_per_gpu * hardware_share(self.job, self.layout)

    @property
    def mfu(self) -> float:
        return self.flops_per_gpu / self.job.hardware.peak(self.job.dtype)


def row_of(job: Job, layout: Layout, constants: Constants) -> Row:
    """For a layout that is one of the model's."""
    return Row(job, layout, step_time(job, layout, constants), memory(job, layout))


def predict(job: Job, layout: Layout, constants: Constants | None = None) -> Row:
    """
    Raises:
        PlanError: the layout is none of that model.
    """
    layout.check(job.model, job.seq)
    return row_of(job, layout, constants or constants_of(job.hardware))


def _divisors(n: int, most: int | None = None) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    every = sorted({*small, *(n // d for d in small)})
    return [d for d in every if most is None or d <= most]


def _slots(layers: int, chunks: int) -> int:
    """Blocks that as many chunks would have if all were as long as the longest."""
    return ceil_div(layers, chunks) * chunks


def layouts(job: Job, gpus: int, global_batch: int, most_pp: int | None = None) -> Iterator[Layout]:
    """All that the planner compares: TP inside a node, PP that divides the blocks, DP the rest."""
    model = job.model
    for tp in _divisors(gpus, min(job.hardware.gpus_per_node, model.heads)):
        for pp in _divisors(
            gpus // tp, min(model.layers, model.layers if most_pp is None else most_pp)
        ):
            dp = gpus // (tp * pp)
            # Stages may be short of blocks (126 over 16), by a tenth at most.
            if global_batch % dp or _slots(model.layers, pp) > 1.1 * model.layers:
                continue
            for micro in (2**i for i in range(6)):
                if global_batch // dp % micro:
                    break
                passes = global_batch // dp // micro
                interleaves = [1]
                if pp > 1 and passes % pp == 0:
                    interleaves += [
                        v
                        for v in range(2, 9)
                        if pp * v <= model.layers
                        and _slots(model.layers, pp * v) <= 1.1 * model.layers
                    ]
                zeros = [0] if dp == 1 else [0, 1] if pp > 1 else [0, 1, 2, 3]
                kinds = (
                    ("none", "selective", "full")
                    if job.software == "megatron-2021"
                    else ("none", "full")
                )
                for sequence_parallel in (False, True) if tp > 1 else (False,):
                    for recompute in kinds:
                        for interleave in interleaves:
                            for zero in zeros:
                                yield Layout(
                                    tp,
                                    pp,
                                    dp,
                                    micro,
                                    global_batch,
                                    interleave,
                                    recompute,
                                    sequence_parallel,
                                    zero,
                                )


@dataclass(frozen=True)
class LayoutChoice:
    """The rows of a search, the fastest that fits first. As a layout (`tpk.init_mesh(plan)`) it is its first row's."""

    job: Job
    gpus: int
    global_batch: int
    rows: tuple[Row, ...]
    too_large: tuple[Row, ...]  # what does not fit, the smallest first

    @property
    def best(self) -> Row:
        return self.rows[0]

    @property
    def tp(self) -> int:
        return self.best.layout.tp

    @property
    def pp(self) -> int:
        return self.best.layout.pp

    @property
    def dp(self) -> int:
        return self.best.layout.dp

    def first(self, wanted: Callable[[Layout], bool]) -> Row | None:
        """The fastest whose layout is wanted."""
        return next((row for row in self.rows if wanted(row.layout)), None)


def search(job: Job, gpus: int, global_batch: int, most_pp: int | None = None) -> LayoutChoice:
    """
    Args:
        global_batch: sequences of a step.
        most_pp: largest pipeline to consider; None: any.

    Raises:
        PlanError: no layout exists, or none fits; the message says by how much, and what would.
    """
    count("gpus", gpus)
    count("global_batch", global_batch)
    if most_pp is not None:
        count("max_pp", most_pp)
    constants = constants_of(job.hardware)
    rows = [row_of(job, layout, constants) for layout in layouts(job, gpus, global_batch, most_pp)]
    if not rows:
        raise PlanError(
            f"{gpus} GPUs cannot share {global_batch} sequences: no TP (of at most {job.hardware.gpus_per_node}) x PP x DP of them has a DP "
            f"that divides the batch; pass a multiple of {gpus // _divisors(gpus, job.hardware.gpus_per_node)[-1]} sequences"
        )
    fitting = sorted(
        (row for row in rows if row.fits), key=lambda row: (row.step_s, row.memory.total)
    )
    larger = tuple(sorted((row for row in rows if not row.fits), key=lambda row: row.memory.total))
    if not fitting:
        raise PlanError(_what_would_fit(job, gpus, global_batch, most_pp, larger[0]))
    return LayoutChoice(job, gpus, global_batch, tuple(fitting), larger)


def _what_would_fit(
    job: Job, gpus: int, global_batch: int, most_pp: int | None, smallest: Row
) -> str:
    over = smallest.memory.total - FIT * job.hardware.memory_bytes
    text = (
        f"no layout of {gpus} {job.hardware.name} fits: the smallest ({smallest.layout.words()}) takes {smallest.memory.total / 1e9:.1f} GB a GPU, "
        f"{over / 1e9:.1f} GB more than the {FIT * job.hardware.memory_bytes / 1e9:.1f} GB it may"
    )
    more = gpus
    while more < 16384:
        more *= 2
        batch = ceil_div(global_batch, more) * more
        if any(
            memory(job, layout).total <= FIT * job.hardware.memory_bytes
            for layout in layouts(job, more, batch, most_pp)
        ):
            return f"{text}; {more} GPUs would do, or as many of {smallest.memory.total / FIT / 1e9:.0f} GB each"
    return f"{text}; GPUs of {smallest.memory.total / FIT / 1e9:.0f} GB each would do"
