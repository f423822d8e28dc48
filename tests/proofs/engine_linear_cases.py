"""Calls of the engine's linear layers and small collectives.

The data are integers, the same whole on every rank: every sum is exact in float32 in any order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
import torch.distributed as dist
import torch.nn.functional as F
from engine_case import Case, Event, of_rank, random_integers
from torch import Tensor

from tpkernels import _C

N, K = 11, 13  # of the row-parallel layer's output, of the column-parallel layers' input
COLUMN_WIDTHS = (4, 3, 2)  # of three layers' outputs on each rank
THROWS = dict(trace=False)  # errors that C++ raises inside the engine must not meet Trace


def count_launches(rows: int, chunks: int, columns: int) -> int:
    if dist.get_world_size() == 1 or not rows:
        return 0
    return len(_C.chunk_bounds(rows, chunks, columns * 4)) - 1


def leading(rows: int) -> tuple[int, ...]:
    """Leading dimensions of `rows` rows, two where they are even."""
    return (2, rows // 2) if rows % 2 == 0 else (rows,)


class RowLayer:
    """A row-parallel layer's data and its calls."""

    def __init__(self, chunks: int, rows: int):
        rng, k = torch.Generator().manual_seed(rows), 5 * dist.get_world_size()
        self.chunks, self.rows = chunks, rows
        self.x = random_integers(rng, *leading(rows), k)
        self.w = random_integers(rng, N, k)
        self.b = random_integers(rng, N)
        self.residual = random_integers(rng, *leading(rows), N)
        self.launches = count_launches(rows, chunks, N)

    def case(self, bias: Tensor | None, residual: Tensor | None, **options) -> Case:
        want = F.linear(self.x, self.w, bias)
        if residual is not None and residual.shape == self.residual.shape:
            want = want + residual
        epilogue = None
        if residual is not None:
            epilogue = "add" if bias is None else "add_bias_residual"

        def call(ops, group):
            x, w = of_rank(self.x), of_rank(self.w)
            return [ops.row_linear(x, w, bias, residual, group, self.chunks, "row")]

        name = f"row_linear bias={bias is not None} residual={residual is not None}"
        options = {"launches": self.launches, "epilogue": epilogue, **options}
        return Case(name, call, [want], **options)

    def cases(self) -> list[Case]:
        return [self.case(b, r) for b in (None, self.b) for r in (None, self.residual)]

    def throwing(self) -> list[Case]:
        """Errors with collectives in flight."""
        result, launches = [], self.launches
        if launches:
            short = self.residual.reshape(self.rows, N)[:-1]
            failing = self.case(self.b, short, error="exceeds dimension size", **THROWS)
            result.append(replace(failing, name="row_linear, the last chunk's epilogue throws"))
        if launches > 1:
            last = {"fail_launch": launches - 1}
            failing = self.case(
                self.b, self.residual, error="^launch", options=last, launches=launches - 1
            )
            result.append(replace(failing, name="row_linear, the last launch fails"))
            # Only the first rank's GEMM takes the bias: every rank says that it is the first.
            shrunk = self.b.clone()
            shrink = {"rank": 0, "on_launch": lambda i: shrunk.resize_(0) if i == 0 else None}
            failing = self.case(
                shrunk, None, error="expanded size", launches=1, options=shrink, **THROWS
            )
            result.append(replace(failing, name="row_linear, a GEMM throws"))
        return result


class ColumnLayers:
    """Three column-parallel layers of one input, and calls of their backward."""

    def __init__(self, chunks: int, rows: int):
        rng, world = torch.Generator().manual_seed(rows + 1), dist.get_world_size()
        self.chunks, self.rows = chunks, rows
        self.x = random_integers(rng, *leading(rows), K)
        self.whole_ws = [random_integers(rng, n * world, K) for n in COLUMN_WIDTHS]
        self.whole_dys = [random_integers(rng, *leading(rows), n * world) for n in COLUMN_WIDTHS]
        self.ws = [of_rank(w, 0) for w in self.whole_ws]
        self.dys = [of_rank(dy) for dy in self.whole_dys]
        self.flat_dys = [dy.reshape(rows, dy.shape[-1]) for dy in self.dys]
        self.launches = count_launches(rows, chunks, K)

    @cached_property
    def dx(self) -> list[Tensor]:
        return [dy @ w for dy, w in zip(self.whole_dys, self.whole_ws, strict=True)]

    @cached_property
    def dws(self) -> list[Tensor]:
        return [dy.t() @ self.x.reshape(self.rows, K) for dy in self.flat_dys]

    @cached_property
    def dbs(self) -> list[Tensor]:
        return [dy.sum(0) for dy in self.flat_dys]

    def case(self, dys, x, weights, needs, want=(), **options) -> Case:
        """`needs`: (the input's gradient, each weight's, each bias')."""

        def call(ops, group):
            tail = (group, self.chunks, "column")
            return ops.column_linear_backward(dys, x, weights, *needs, *tail)

        name = "column_linear_backward layers={} dx={} dw={} db={}".format(len(dys), *needs)
        options = {"launches": self.launches if needs[0] else 0, **options}
        return Case(name, call, list(want), **options)

    def cases(self) -> list[Case]:
        yes, no = [True] * 3, [False] * 3
        some = (True, [False, True, False], [True, False, False])
        total = self.dx[0] + self.dx[1] + self.dx[2]
        first = (True, [False], [False])
        return [
            self.case(self.dys, self.x, self.ws, (True, yes, yes), [total, *self.dws, *self.dbs]),
            self.case(self.dys, self.x, self.ws, some, [total, self.dws[1], self.dbs[0]]),
            self.case(self.dys[:1], None, self.ws[:1], first, [self.dx[0]]),
            self.case(self.dys, self.x, [], (False, yes, no), self.dws),
        ]

    def throwing(self) -> list[Case]:
        """Errors with collectives in flight."""
        result, launches = [], self.launches
        broken = dict(error="shapes cannot be multiplied", **THROWS)
        yes, no = [True] * 3, [False] * 3
        if launches:
            short = self.x[..., :-1, :]
            failing = self.case(self.dys, short, self.ws, (True, yes, yes), **broken)
            name = "column_linear_backward, dw's GEMM throws"
            result.append(replace(failing, name=name))
        if launches > 1:
            short = [self.flat_dys[0], self.flat_dys[1][:-1]]
            error = dict(error="exceeds dimension size", launches=launches - 1, **THROWS)
            failing = self.case(short, None, self.ws[:2], (True, no[:2], no[:2]), **error)
            name = "column_linear_backward, the last chunk of a layer is short"
            result.append(replace(failing, name=name))
            options = {"fail_launch": launches - 1}
            error = dict(error="^launch", options=options, launches=launches - 1)
            failing = self.case(self.dys, None, self.ws, (True, no, no), **error)
            name = "column_linear_backward, the last launch fails"
            result.append(replace(failing, name=name))
            turned = [w.clone() for w in self.ws]
            options = {"on_launch": lambda i: turned[0].t_() if i == 0 else None}
            error = dict(launches=1, options=options, **broken)
            failing = self.case(self.dys, None, turned, (True, no, no), **error)
            result.append(replace(failing, name="column_linear_backward, a GEMM throws"))
        return result


def collective_cases(rows: int) -> list[Case]:
    """all_reduce_, all_gather and vocab_embedding."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rng = torch.Generator().manual_seed(rows + 2)
    whole = random_integers(rng, world, max(rows, 1), 6)
    turned = whole.transpose(1, 2)
    one = 1 if world > 1 else 0
    result = []
    for name, part, op, reduced in (
        ("contiguous", whole, "sum", whole.sum(0)),
        ("strided", turned, "sum", turned.sum(0)),
        ("integer", whole.long(), "max", whole.long().amax(0)),
    ):

        def all_reduce_(ops, group, part=part, op=op):
            buffer = part.clone()[rank]  # clone keeps the strides
            ops.all_reduce_(buffer, group, op, "sum")
            return [buffer]

        result.append(Case(f"all_reduce_ {name}", all_reduce_, [reduced], one))
    for name, part in (("contiguous", whole), ("strided", turned)):

        def all_gather(ops, group, part=part):
            return [ops.all_gather(part[rank], group, "gather")]

        result.append(Case(f"all_gather {name}", all_gather, [part], 1))
    ids = torch.randint(0, 3 * world, leading(rows), generator=rng)
    table = random_integers(rng, 3 * world, 5)

    def embedding(ops, group):
        return [ops.vocab_embedding(ids, of_rank(table, 0), 3 * rank, group, "embedding")]

    result.append(Case("vocab_embedding", embedding, [table[ids]], one if rows else 0))
    return result


def linear_cases(chunks: int, rows: int) -> list[Case]:
    row, column = RowLayer(chunks, rows), ColumnLayers(chunks, rows)
    result = [*row.cases(), *column.cases(), *collective_cases(rows)]
    # An error from the collective itself, which NCCL reports at the wait, comes out of the op.
    for case in list(result):
        for i in sorted({0, case.launches - 1}) if case.launches else ():
            result.append(case.failing(i))
    return [*result, *column.throwing(), *row.throwing()]


def norm_case(chunks: int, rows: int, with_bias: bool, with_residual: bool, **options) -> Case:
    """row_linear_rms_norm, with bias, residual and norm weight that are not contiguous."""
    world, rng = dist.get_world_size(), torch.Generator().manual_seed(rows)
    x, w = random_integers(rng, rows, 5 * world), random_integers(rng, N, 5 * world)
    bias = random_integers(rng, 2 * N)[::2] if with_bias else None
    residual = random_integers(rng, rows, 2 * N)[:, ::2] if with_residual else None
    weight, eps = (random_integers(rng, 2 * N) / 4)[::2], 0.5
    total = sum((t for t in (bias, residual) if t is not None), F.linear(x, w)).double()
    normed = total * (total.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    def call(ops, group):
        layer = (of_rank(x), of_rank(w), bias, residual)
        return ops.row_linear_rms_norm(*layer, weight, eps, group, chunks, "row")

    options.setdefault("schedule", norm_schedule(chunks, rows, with_bias, with_residual))
    name = f"row_linear_rms_norm bias={with_bias} residual={with_residual}"
    return Case(name, call, [total.float(), normed.float()], tolerance=1e-6, **options)


def norm_schedule(chunks: int, rows: int, with_bias: bool, with_residual: bool) -> list[Event]:
    """All GEMMs and launches, then each chunk's wait and epilogue, then the norm."""
    count = len(_C.chunk_bounds(rows, chunks, N * 4)) - 1
    reduced = dist.get_world_size() > 1 and rows > 0
    gemm_adds_bias = with_bias and not with_residual and dist.get_rank() == 0
    events: list[Event] = []
    for i in range(count):
        events.append(("op", "addmm" if gemm_adds_bias else "mm"))
        events += [("launch", i)] * reduced
    for i in range(count):
        events += [("wait", i)] * reduced
        events += [("op", "add_bias_residual")] * (with_bias and with_residual)
    return [*events, ("op", "norm")]


def norm_cases(chunks: int, rows: int) -> list[Case]:
    """row_linear_rms_norm, one chunk or more, without a peer all-reduce."""
    return [norm_case(chunks, rows, b, r) for b in (False, True) for r in (False, True)]
