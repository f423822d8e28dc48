"""Calls of the engine's ops for test_stream_semantics.py: what comes out, and which collectives hide under which GEMM."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deferred import Trace, deferred
from torch import Tensor

from tpkernels import _C


@dataclass
class Case:
    """A call of an op of the engine. `launches`: collectives in flight at once, or up to the error where `error` (a regex) is expected."""

    name: str  # the op's comes first
    call: Callable  # (torch.ops.<library>, group name) -> list of results
    want: list[Tensor]
    launches: int = 0
    error: str | None = None
    options: dict = field(default_factory=dict)  # of the deferred group
    trace: bool = True
    epilogue: str | None = None  # the op that must ride under the later chunks' collectives
    tolerance: float = 0.0  # of the results' largest element, where exp and log have to be computed
    # Where some collectives are waited for at once: the launches, waits and WATCHED ops, up to the error if there is one. `launches`
    # follows from it.
    schedule: list[tuple[str, int | str]] | None = None
    peers: int | None = None  # bytes that the group's peer memory takes at most, if it has one
    taken: list[str] = field(
        default_factory=list
    )  # the all-reduces that go through it: shape and epilogue

    def __post_init__(self):
        if self.schedule is not None:
            self.launches = sum(what == "launch" for what, _ in self.schedule)

    @property
    def op(self) -> str:
        return re.split("[ ,]", self.name)[0]

    def failing(self, i: int) -> Case:
        """The same with an error at the wait for collective i, which comes out of the op."""
        changed = dict(
            name=f"{self.name}, wait {i} fails", options={"fail_wait": i}, error=f"^wait {i}$"
        )
        if self.schedule is not None:
            changed["schedule"] = self.schedule[: self.schedule.index(("wait", i)) + 1]
        return replace(self, **changed)


def random_integers(rng, *shape):
    return torch.randint(-3, 4, shape, generator=rng).float()


def of_rank(t, dim=-1):
    return t.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def cases(chunks: int, rows: int) -> list[Case]:
    """Integer-valued data, the same whole on every rank: every sum is exact in float32 in any order."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rng = torch.Generator().manual_seed(rows)

    def integers(*shape):
        return random_integers(rng, *shape)

    def launches(features):
        return len(_C.chunk_bounds(rows, chunks, features * 4)) - 1 if world > 1 and rows else 0

    result = []
    lead, n, k = (2, rows // 2) if rows % 2 == 0 else (rows,), 11, 13
    x, w, b, residual = (
        integers(*lead, 5 * world),
        integers(n, 5 * world),
        integers(n),
        integers(*lead, n),
    )
    x_i, w_i, flight = of_rank(x), of_rank(w), launches(n)

    def row(bias, rest, **options):
        want = (
            F.linear(x, w, bias)
            if rest is None or rest.shape != residual.shape
            else F.linear(x, w, bias) + rest
        )
        name = f"row_linear bias={bias is not None} residual={rest is not None}"
        epilogue = None if rest is None else "add" if bias is None else "add_bias_residual"
        call = lambda ops, group: [ops.row_linear(x_i, w_i, bias, rest, group, chunks, "row")]  # noqa: E731
        return Case(name, call, [want], **{"launches": flight, "epilogue": epilogue, **options})

    result += [row(bias, rest) for bias in (None, b) for rest in (None, residual)]

    inner = integers(*lead, k)  # the column-parallel layers' input
    ws, dys = (
        [integers(m * world, k) for m in (4, 3, 2)],
        [integers(*lead, m * world) for m in (4, 3, 2)],
    )
    dx = sum(dy @ weight for dy, weight in zip(dys, ws, strict=True))
    ws_i, dys_i = [of_rank(t, 0) for t in ws], [of_rank(t) for t in dys]
    flat = [dy.reshape(rows, dy.shape[-1]) for dy in dys_i]
    dws, dbs = [dy.t() @ inner.reshape(rows, k) for dy in flat], [dy.sum(0) for dy in flat]
    column_flight = launches(k)

    def column(dys, x, weights, need_x, need_w, need_b, want=(), **options):
        name = f"column_linear_backward layers={len(dys)} dx={need_x} dw={need_w} db={need_b}"

        def call(ops, group):
            return ops.column_linear_backward(
                dys, x, weights, need_x, need_w, need_b, group, chunks, "column"
            )

        return Case(
            name, call, list(want), **{"launches": column_flight if need_x else 0, **options}
        )

    yes, no = [True] * 3, [False] * 3
    result.append(column(dys_i, inner, ws_i, True, yes, yes, [dx, *dws, *dbs]))
    result.append(
        column(
            dys_i,
            inner,
            ws_i,
            True,
            [False, True, False],
            [True, False, False],
            [dx, dws[1], dbs[0]],
        )
    )
    result.append(column(dys_i[:1], None, ws_i[:1], True, [False], [False], [dys[0] @ ws[0]]))
    result.append(column(dys_i, inner, [], False, yes, no, dws))

    whole = integers(world, max(rows, 1), 6)
    one = 1 if world > 1 else 0
    for name, part, op, reduced in (
        ("contiguous", whole, "sum", whole.sum(0)),
        ("strided", whole.transpose(1, 2), "sum", whole.transpose(1, 2).sum(0)),
        ("integer", whole.long(), "max", whole.long().amax(0)),
    ):

        def all_reduce_(ops, group, part=part, op=op):
            buffer = part.clone()[rank]  # clone keeps the strides
            ops.all_reduce_(buffer, group, op, "sum")
            return [buffer]

        result.append(Case(f"all_reduce_ {name}", all_reduce_, [reduced], one))
    for name, part in (("contiguous", whole), ("strided", whole.transpose(1, 2))):
        call = lambda ops, group, part=part: [ops.all_gather(part[rank], group, "gather")]  # noqa: E731
        result.append(Case(f"all_gather {name}", call, [part], 1))
    ids, table = torch.randint(0, 3 * world, lead, generator=rng), integers(3 * world, 5)

    def embedding(ops, group):
        return [ops.vocab_embedding(ids, of_rank(table, 0), 3 * rank, group, "embedding")]

    result.append(Case("vocab_embedding", embedding, [table[ids]], one if rows else 0))

    # An error from the collective itself, which NCCL reports at the wait, comes out of the op.
    result += [
        case.failing(i) for case in result for i in sorted({0, case.launches - 1}) if case.launches
    ]
    # Errors with collectives in flight. What C++ raises inside the engine must not meet Trace.
    if column_flight:
        broken = dict(error="shapes cannot be multiplied", trace=False)
        result.append(
            replace(
                column(dys_i, inner[..., :-1, :], ws_i, True, yes, yes, **broken),
                name="column_linear_backward, dw's GEMM throws",
            )
        )
        if column_flight > 1:
            last = dict(launches=column_flight - 1)
            short = column(
                [flat[0], flat[1][:-1]],
                None,
                ws_i[:2],
                True,
                no[:2],
                no[:2],
                error="exceeds dimension size",
                trace=False,
                **last,
            )
            result.append(
                replace(short, name="column_linear_backward, the last chunk of a layer is short")
            )
            failing = column(
                dys_i,
                None,
                ws_i,
                True,
                no,
                no,
                error="^launch",
                options={"fail_launch": column_flight - 1},
                **last,
            )
            result.append(replace(failing, name="column_linear_backward, the last launch fails"))
            turned = [w.clone() for w in ws_i]
            turn = {"on_launch": lambda i: turned[0].t_() if i == 0 else None}
            result.append(
                replace(
                    column(dys_i, None, turned, True, no, no, launches=1, options=turn, **broken),
                    name="column_linear_backward, a GEMM throws",
                )
            )
    if flight:
        short = residual.reshape(rows, n)[:-1]
        failing = row(b, short, error="exceeds dimension size", trace=False)
        result.append(replace(failing, name="row_linear, the last chunk's epilogue throws"))
    if flight > 1:
        failing = row(
            b, residual, error="^launch", options={"fail_launch": flight - 1}, launches=flight - 1
        )
        result.append(replace(failing, name="row_linear, the last launch fails"))
        shrunk = (
            b.clone()
        )  # only the first rank's GEMM takes the bias: every rank says it is the first
        shrink = {"rank": 0, "on_launch": lambda i: shrunk.resize_(0) if i == 0 else None}
        failing = row(shrunk, None, error="expanded size", launches=1, options=shrink, trace=False)
        result.append(replace(failing, name="row_linear, a GEMM throws"))
    return result


def norm_cases(chunks: int, rows: int) -> list[Case]:
    """row_linear_rms_norm, one chunk or more, without peer memory."""
    return [
        row_norm(chunks, rows, bias, residual)
        for bias in (False, True)
        for residual in (False, True)
    ]


def row_norm(chunks, rows, with_bias, with_residual, **options) -> Case:
    world, rank, rng = dist.get_world_size(), dist.get_rank(), torch.Generator().manual_seed(rows)
    x, w = random_integers(rng, rows, 5 * world), random_integers(rng, 11, 5 * world)
    bias = random_integers(rng, 22)[::2] if with_bias else None  # not contiguous
    residual = random_integers(rng, rows, 22)[:, ::2] if with_residual else None
    weight, eps = (random_integers(rng, 22) / 4)[::2], 0.5
    total = sum((t for t in (bias, residual) if t is not None), F.linear(x, w)).double()
    normed = total * (total.square().mean(-1, keepdim=True) + eps).rsqrt() * weight

    def call(ops, group):
        return ops.row_linear_rms_norm(
            of_rank(x), of_rank(w), bias, residual, weight, eps, group, chunks, "row"
        )

    options.setdefault(
        "schedule",
        row_schedule(
            chunks,
            rows,
            bias is not None and rank == 0,
            bias is not None,
            residual is not None,
            True,
        ),
    )
    name = f"row_linear_rms_norm bias={with_bias} residual={with_residual}"
    return Case(name, call, [total.float(), normed.float()], tolerance=1e-6, **options)


def row_schedule(chunks, rows, adds_bias, bias, residual, norm):
    count, reduced = (
        len(_C.chunk_bounds(rows, chunks, 44)) - 1,
        dist.get_world_size() > 1 and rows > 0,
    )
    events = []
    for i in range(count):
        events += [
            ("op", "addmm" if adds_bias and not residual else "mm"),
            *([("launch", i)] if reduced else []),
        ]
    for i in range(count):
        events += [
            *([("wait", i)] if reduced else []),
            *([("op", "add_bias_residual")] if bias and residual else []),
        ]
    return events + [("op", "norm")] * norm


def loss_cases(chunks: int, rows: int) -> list[Case]:
    """The cross entropies, in logits so far from zero that only their true maximum keeps the exponentials in range."""
    world, rank, rng = dist.get_world_size(), dist.get_rank(), torch.Generator().manual_seed(rows)
    classes, features, smoothing = 4 * world - 1, 5, 0.25
    x, w, b = (
        random_integers(rng, *shape)
        for shape in ((rows, features), (classes, features), (classes,))
    )
    w[:, -1] = 1
    x[:, -1] = 300 * torch.randint(-1, 2, (rows,), generator=rng)
    target = torch.randint(classes, (rows,), generator=rng)
    target[::5] = -100
    widths = [len(part) for part in w.chunk(world)]
    first, mine = sum(widths[:rank]), of_rank(w, 0)
    result = []

    for s in (0.0, smoothing):
        logits = F.linear(x, w, b).double()
        want = [
            F.cross_entropy(logits, target, reduction="none", label_smoothing=s),
            logits.logsumexp(1),
        ]
        want.append(torch.tensor([max(widths), -min(widths)]))
        shard = of_rank(logits).float()

        def call(ops, group, z=shard, s=s):
            return ops.vocab_ce(z, target, first, classes, -100, s, group, "loss")

        schedule = small_all_reduces(0, rows)
        result.append(
            Case(f"vocab_ce smoothing={s}", call, want, tolerance=1e-6, schedule=schedule)
        )

    chunk_rows = max(1, -(-rows // chunks))
    scale = torch.randint(1, 4, (rows,), generator=rng).float().masked_fill(target == -100, 0)
    for bias, scale_, wanted in (
        (b, scale, (True, True, True)),
        (None, scale, (True, True, False)),
        (b, scale, (True, False, False)),
        (b, scale, (False, True, True)),
        (b, None, (False, False, False)),
    ):
        leaves = [t if t is None else t.double().requires_grad_() for t in (x, w, bias)]
        losses = F.cross_entropy(
            F.linear(*leaves), target, reduction="none", label_smoothing=smoothing
        )
        grads = torch.autograd.grad((losses * scale).sum(), [t for t in leaves if t is not None])
        want = [
            losses.detach(),
            *(g if i == 0 else of_rank(g, 0) for i, g in enumerate(grads) if wanted[i]),
        ]

        def call(ops, group, bias=bias, scale=scale_, wanted=wanted, weight=mine):
            part = None if bias is None else of_rank(bias, 0)
            options = (first, classes, -100, smoothing, chunk_rows, *wanted, group, "loss")
            return ops.vocab_linear_ce(x, weight, part, target, scale, *options)

        schedule = linear_ce_schedule(
            rows, chunk_rows, bias is not None, scale_ is not None, *wanted
        )
        name = f"vocab_linear_ce bias={bias is not None} gradients={wanted}"
        result.append(
            Case(name, call, want, tolerance=1e-4, schedule=schedule)
        )  # float32 has 3e-5 at 300
    failing = [
        0,
        1,
        3,
        4,
    ]  # small ones of the first and the second chunk, the latter with the first input gradient in flight
    for case in list(result):
        waits = [i for what, i in case.schedule if what == "wait"]
        result += [case.failing(i) for i in sorted({*failing, *waits[-1:]} & set(waits))]
    if rows > chunk_rows and world > 1:
        turned = mine.clone()
        turn = {"on_launch": lambda i: turned.t_() if i == 2 else None}
        throws = dict(
            name="vocab_linear_ce, a GEMM throws",
            options=turn,
            error="shapes cannot be multiplied",
            trace=False,
        )
        broken = lambda ops, group: call(ops, group, b, scale, (True, False, False), turned)  # noqa: E731
        result.append(
            replace(
                case, call=broken, schedule=[*small_all_reduces(0, rows), ("launch", 2)], **throws
            )
        )
    return result


def small_all_reduces(n: int, rows: int) -> list[tuple[str, int]]:
    """The maxima's and the sums', each waited for at once; `n` collectives were launched before them."""
    count = (1 + (rows > 0)) * (dist.get_world_size() > 1)
    return [(what, i) for i in range(n, n + count) for what in ("launch", "wait")]


def linear_ce_schedule(rows, chunk_rows, bias, scaled, input_grad, weight_grad, bias_grad):
    """Chunk i's input gradient is launched before the weight gradient's GEMM, and waited for when all chunks are issued."""
    events, waits, n = [], [], 0
    for begin in range(0, max(rows, 1), chunk_rows):
        small = small_all_reduces(n, min(rows - begin, chunk_rows))
        n += len(small) // 2
        events += [("op", "addmm" if bias else "mm"), *small]
        if not scaled:
            continue
        events.append(("op", "vocab_ce_grad"))
        if input_grad:
            events.append(("op", "mm"))
            if dist.get_world_size() > 1 and rows:
                events.append(("launch", n))
                waits.append(("wait", n))
                n += 1
        events += [("op", "addmm")] * weight_grad + [("op", "sum")] * bias_grad
    return events + waits


def peer_cases(chunks: int, rows: int) -> list[Case]:
    """Through a peer memory (engine_mutants.py has one) goes a sum in one chunk that fits it, with its epilogue, and nothing else."""
    world, rank, rng = dist.get_world_size(), dist.get_rank(), torch.Generator().manual_seed(rows)
    if world == 1:
        return []
    plenty, at_once = 1 << 20, [("launch", 0), ("wait", 0)]
    result = []
    for with_bias in (False, True):
        for with_residual in (False, True):
            words = "".join(
                word
                for word, there in ((" bias", with_bias), (" residual", with_residual))
                if there
            )
            for room, pieces in ((plenty, 1), (rows * 11 * 4 - 4, 1), (plenty, chunks)):
                schedule, taken = (
                    row_schedule(
                        pieces, rows, with_bias and rank == 0, with_bias, with_residual, True
                    ),
                    [],
                )
                if room == plenty and pieces == 1:
                    schedule, taken = [("op", "mm"), *at_once], [f"{rows}x11{words}"]
                normed = row_norm(
                    pieces,
                    rows,
                    with_bias,
                    with_residual,
                    schedule=schedule,
                    peers=room,
                    taken=[f"{t} normed weight" for t in taken],
                )
                # The same layer without the norm.
                plain = lambda ops, group, call=normed.call: call(_WithoutNorm(ops), group)  # noqa: E731
                schedule = [event for event in schedule if event != ("op", "norm")]
                where = f", {pieces} chunks, peers take {room} bytes"
                result.append(replace(normed, name=normed.name + where))
                name = f"row_linear bias={with_bias} residual={with_residual}{where}"
                result.append(
                    Case(name, plain, normed.want[:1], schedule=schedule, peers=room, taken=taken)
                )

    x, w, dy = (
        random_integers(rng, *shape) for shape in ((rows, 13), (4 * world, 13), (rows, 4 * world))
    )
    for pieces in (1, chunks):
        call = lambda ops, group, n=pieces: ops.column_linear_backward(  # noqa: E731
            [of_rank(dy)], x, [of_rank(w, 0)], True, [True], [True], group, n, "column"
        )
        count = len(_C.chunk_bounds(rows, pieces, 13 * 4)) - 1
        if count == 1:
            schedule = [("op", "mm"), *at_once, ("op", "mm"), ("op", "sum")]
        else:
            schedule = [event for i in range(count) for event in (("op", "mm"), ("launch", i))]
            schedule += [("op", "mm"), ("op", "sum"), *(("wait", i) for i in range(count))]
        want = [dy @ w, of_rank(dy).t() @ x, of_rank(dy).sum(0)]
        taken = [f"{rows}x13"] if count == 1 else []
        result.append(
            Case(
                f"column_linear_backward, {pieces} chunks, peers",
                call,
                want,
                schedule=schedule,
                peers=plenty,
                taken=taken,
            )
        )

    whole = random_integers(rng, world, rows, 6)
    for name, part, op, want in (
        ("sum", whole, "sum", whole.sum(0)),
        ("strided sum", whole.transpose(1, 2), "sum", whole.transpose(1, 2).sum(0)),
        ("max", whole, "max", whole.amax(0)),
        ("sum of integers", whole.long(), "sum", whole.long().sum(0)),
        ("sum of nothing", whole[:, :0], "sum", whole[0, :0]),
    ):

        def call(ops, group, part=part, op=op):
            buffer = part.clone()[rank]
            ops.all_reduce_(buffer, group, op, "sum")
            return [buffer]

        taken = [f"1x{rows * 6}"] if name in ("sum", "strided sum") else []
        result.append(
            Case(
                f"all_reduce_ {name}, peers",
                call,
                [want],
                schedule=at_once if want.numel() else [],
                peers=plenty,
                taken=taken,
            )
        )
    ids, table = (
        torch.randint(0, 3 * world, (rows,), generator=rng),
        random_integers(rng, 3 * world, 5),
    )

    def embedding(ops, group):
        return [ops.vocab_embedding(ids, of_rank(table, 0), 3 * rank, group, "embedding")]

    result.append(
        Case(
            "vocab_embedding, peers",
            embedding,
            [table[ids]],
            schedule=at_once,
            peers=plenty,
            taken=[f"1x{rows * 5}"],
        )
    )
    gone = replace(
        result[-1], name="vocab_embedding, a group's peers that is gone", peers=-plenty, taken=[]
    )
    result.append(gone)
    loss = next(
        case for case in loss_cases(chunks, rows) if case.op == "vocab_ce"
    )  # its maximum is not a sum
    result.append(replace(loss, name="vocab_ce, peers", peers=plenty, taken=[f"1x{2 * rows}"]))
    return result


class _WithoutNorm:
    """Stands for an op library: row_linear_rms_norm's arguments go to row_linear."""

    def __init__(self, ops):
        self.ops = ops

    def row_linear_rms_norm(self, input, weight, bias, residual, norm_weight, eps, *rest):
        return [self.ops.row_linear(input, weight, bias, residual, *rest)]


HIDDEN = (
    "mm",
    "addmm",
    "sum",
)  # what collectives hide under: all of it is issued before the first wait
WATCHED = (*HIDDEN, "vocab_ce_grad", "norm", "add_bias_residual")  # in a schedule


def close(ours: Tensor, want: Tensor, tolerance: float) -> bool:
    if not tolerance or not want.numel():
        return torch.equal(ours, want)
    return ours.shape == want.shape and bool(
        (ours - want).abs().max() <= tolerance * want.abs().max().clamp_min(1)
    )


def check(case: Case, library: str, mode: str) -> list[str]:
    """What is wrong with the op of torch.ops.<library>."""
    got, error, found = None, None, []
    ops = getattr(torch.ops, library)
    with deferred(mode, **case.options) as group:
        if case.peers is not None:
            ops.open_peers(group.registered_name, case.peers)
        try:
            with Trace(group) if case.trace else nullcontext():
                got = case.call(ops, group.registered_name)
        except Exception as caught:
            error = caught
        if case.peers is not None:
            taken, logged = ops.close_peers(group.registered_name)
            if taken != case.taken:
                found.append(f"peer memory took {taken}, not {case.taken}")
            if len(logged) != case.launches:
                found.append(f"the log has {logged}, and there were {case.launches} collectives")
    found, events = [*group.violations, *found], group.events
    if case.error is None and error is not None:
        found.append(f"raised {error!r}")
    elif case.error is not None and not re.search(case.error, str(error)):
        found.append(f"raised {error!r} instead of {case.error!r}")
    if case.error is None and got is not None and len(got) != len(case.want):
        found.append(f"{len(got)} results")
    elif (
        case.error is None
        and got is not None
        and not all(close(a, b, case.tolerance) for a, b in zip(got, case.want, strict=True))
    ):
        found.append("wrong result")
    if len(group.works) != case.launches:
        found.append(f"{len(group.works)} collectives, not {case.launches}")
    if case.schedule is not None:
        watched = [
            event for event in events if event[0] != "op" or (case.trace and event[1] in WATCHED)
        ]
        wanted = [event for event in case.schedule if event[0] != "op" or case.trace]
        if (watched if case.error is None else watched[: len(wanted)]) != wanted:
            found.append(f"issued {watched}, not {wanted}")
        return [f"{case.name}: {text}" for text in found]
    if group.max_in_flight != case.launches:
        found.append(f"{group.max_in_flight} of {case.launches} collectives in flight at once")
    after = events[next((i for i, (what, _) in enumerate(events) if what == "wait"), len(events)) :]
    if late := [name for _, name in after if name in HIDDEN]:
        found.append(f"{late[0]} was issued after a wait")
    in_turn = [
        event for i in range(case.launches) for event in (("wait", i), ("op", case.epilogue))
    ]
    if case.error is None and case.epilogue and after and after != in_turn:
        found.append("chunk i's epilogue was not issued between the waits for i and i + 1")
    return [f"{case.name}: {text}" for text in found]
