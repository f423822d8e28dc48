"""Calls of the engine's cross entropies.

The logits are so far from zero that only their true maximum keeps the exponentials in range.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from engine_case import Case, Event, of_rank, random_integers
from torch import Tensor

K, SMOOTHING, IGNORED = 5, 0.25, -100
Wanted = tuple[bool, bool, bool]  # gradients of the input, the weight, the bias


class OutputLayer:
    """The data, and calls of both cross entropies."""

    def __init__(self, chunks: int, rows: int):
        world, rng = dist.get_world_size(), torch.Generator().manual_seed(rows)
        self.rows, self.classes = rows, 4 * world - 1
        self.chunk_rows = max(1, -(-rows // chunks))
        self.x = random_integers(rng, rows, K)
        self.w = random_integers(rng, self.classes, K)
        self.b = random_integers(rng, self.classes)
        self.w[:, -1] = 1
        self.x[:, -1] = 300 * torch.randint(-1, 2, (rows,), generator=rng)
        self.target = torch.randint(self.classes, (rows,), generator=rng)
        self.target[::5] = IGNORED
        self.widths = [len(part) for part in self.w.chunk(world)]
        self.vocab_start_index = sum(self.widths[: dist.get_rank()])
        scale = torch.randint(1, 4, (rows,), generator=rng).float()
        self.scale = scale.masked_fill(self.target == IGNORED, 0)

    def loss_case(self, smoothing: float) -> Case:
        """vocab_ce: (loss, log of the sum of exponentials, [widest shard, -narrowest])."""
        logits = F.linear(self.x, self.w, self.b).double()
        loss = F.cross_entropy(logits, self.target, reduction="none", label_smoothing=smoothing)
        widths = torch.tensor([max(self.widths), -min(self.widths)])
        shard = of_rank(logits).float()

        def call(ops, group):
            vocabulary = (self.vocab_start_index, self.classes, IGNORED)
            return ops.vocab_ce(shard, self.target, *vocabulary, smoothing, group, "loss")

        return Case(
            f"vocab_ce smoothing={smoothing}",
            call,
            [loss, logits.logsumexp(1), widths],
            tolerance=1e-6,
            schedule=small_all_reduces(0, self.rows),
        )

    def call(self, ops, group, bias, scale, wanted: Wanted, weight: Tensor):
        """vocab_linear_ce of this rank's `weight`."""
        part = None if bias is None else of_rank(bias, 0)
        vocabulary = (self.vocab_start_index, self.classes, IGNORED)
        options = (*vocabulary, SMOOTHING, self.chunk_rows, *wanted, group, "loss")
        return ops.vocab_linear_ce(self.x, weight, part, self.target, scale, *options)

    def linear_case(self, bias: Tensor | None, scale: Tensor | None, wanted: Wanted) -> Case:
        leaves = [
            None if t is None else t.double().requires_grad_() for t in (self.x, self.w, bias)
        ]
        losses = F.cross_entropy(
            F.linear(*leaves), self.target, reduction="none", label_smoothing=SMOOTHING
        )
        there = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad((losses * self.scale).sum(), there)
        shards = [grads[0], *(of_rank(grad, 0) for grad in grads[1:])]
        want = [losses.detach(), *(g for g, w in zip(shards, wanted, strict=False) if w)]

        def call(ops, group):
            return self.call(ops, group, bias, scale, wanted, of_rank(self.w, 0))

        name = f"vocab_linear_ce bias={bias is not None} gradients={wanted}"
        schedule = self.schedule(bias is not None, scale is not None, wanted)
        return Case(name, call, want, tolerance=1e-4, schedule=schedule)  # float32 has 3e-5 at 300

    def schedule(self, bias: bool, scaled: bool, wanted: Wanted) -> list[Event]:
        """Chunk i's input gradient is launched before the weight gradient's GEMM, and waited for
        when all chunks are issued.
        """
        input_grad, weight_grad, bias_grad = wanted
        reduced = dist.get_world_size() > 1 and self.rows > 0
        events: list[Event] = []
        waits: list[Event] = []
        launched = 0
        for begin in range(0, max(self.rows, 1), self.chunk_rows):
            small = small_all_reduces(launched, min(self.rows - begin, self.chunk_rows))
            launched += len(small) // 2
            events += [("op", "addmm" if bias else "mm"), *small]
            if not scaled:
                continue
            events += [("op", "vocab_ce_grad"), *[("op", "mm")] * input_grad]
            if input_grad and reduced:
                events.append(("launch", launched))
                waits.append(("wait", launched))
                launched += 1
            events += [("op", "addmm")] * weight_grad + [("op", "sum")] * bias_grad
        return events + waits

    def throwing(self) -> Case:
        """A GEMM throws with the first chunk's input gradient in flight."""
        turned = of_rank(self.w, 0).clone()

        def call(ops, group):
            return self.call(ops, group, self.b, self.scale, (True, False, False), turned)

        return Case(
            "vocab_linear_ce, a GEMM throws",
            call,
            [],
            error="shapes cannot be multiplied",
            options={"on_launch": lambda i: turned.t_() if i == 2 else None},
            trace=False,
            schedule=[*small_all_reduces(0, self.rows), ("launch", 2)],
        )


def small_all_reduces(launched: int, rows: int) -> list[Event]:
    """The maxima's and the sums', each waited for at once, after `launched` collectives."""
    count = (1 + (rows > 0)) * (dist.get_world_size() > 1)
    numbers = range(launched, launched + count)
    return [(what, i) for i in numbers for what in ("launch", "wait")]


def loss_cases(chunks: int, rows: int) -> list[Case]:
    layer = OutputLayer(chunks, rows)
    result = [
        layer.loss_case(0.0),
        layer.loss_case(SMOOTHING),
        layer.linear_case(layer.b, layer.scale, (True, True, True)),
        layer.linear_case(None, layer.scale, (True, True, False)),
        layer.linear_case(layer.b, layer.scale, (True, False, False)),
        layer.linear_case(layer.b, layer.scale, (False, True, True)),
        layer.linear_case(layer.b, None, (False, False, False)),
    ]
    # Small all-reduces of the first and the second chunk, the latter with the first input gradient
    # in flight, and the last wait.
    failing = [0, 1, 3, 4]
    for case in list(result):
        assert case.schedule is not None
        waits = [i for what, i in case.schedule if what == "wait"]
        result += [case.failing(i) for i in sorted({*failing, *waits[-1:]} & set(waits))]
    if rows > layer.chunk_rows and dist.get_world_size() > 1:
        result.append(layer.throwing())
    return result


def one_loss_case(chunks: int, rows: int, **options) -> Case:
    """vocab_ce without smoothing."""
    return replace(OutputLayer(chunks, rows).loss_case(0.0), **options)
