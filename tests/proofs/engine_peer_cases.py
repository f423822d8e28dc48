"""Calls of the engine on a group with a peer all-reduce (engine_source.py has one).

A sum in one chunk that fits it goes through it, with its epilogue, and nothing else does.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from engine_case import Case, Event, of_rank, random_integers
from engine_linear_cases import K, N, norm_case, norm_schedule
from engine_loss_cases import one_loss_case

from tpkernels import _C

PLENTY = 1 << 20  # bytes
AT_ONCE: list[Event] = [("launch", 0), ("wait", 0)]


class _WithoutNorm:
    """Stands for an op library: row_linear_rms_norm's arguments go to row_linear."""

    def __init__(self, ops):
        self.ops = ops

    def row_linear_rms_norm(self, input, weight, bias, residual, norm_weight, eps, *rest):
        return [self.ops.row_linear(input, weight, bias, residual, *rest)]


def row_cases(rows: int, room: int, chunks: int, with_bias: bool, with_residual: bool):
    """The layer with and without its norm; `room` is the bytes that the peer all-reduce takes."""
    schedule, taken = norm_schedule(chunks, rows, with_bias, with_residual), []
    if room == PLENTY and chunks == 1:
        epilogue = " bias" * with_bias + " residual" * with_residual
        schedule, taken = [("op", "mm"), *AT_ONCE], [f"{rows}x{N}{epilogue}"]
    normed = norm_case(
        chunks,
        rows,
        with_bias,
        with_residual,
        schedule=schedule,
        peers=room,
        taken=[f"{shape} normed weight" for shape in taken],
    )

    def plain(ops, group):
        return normed.call(_WithoutNorm(ops), group)

    where = f", {chunks} chunks, peers take {room} bytes"
    name = f"row_linear bias={with_bias} residual={with_residual}{where}"
    schedule = [event for event in schedule if event != ("op", "norm")]
    return [
        replace(normed, name=normed.name + where),
        Case(name, plain, normed.want[:1], schedule=schedule, peers=room, taken=taken),
    ]


def column_case(rows: int, chunks: int) -> Case:
    rng, world = torch.Generator().manual_seed(rows), dist.get_world_size()
    x, w = random_integers(rng, rows, K), random_integers(rng, 4 * world, K)
    dy = random_integers(rng, rows, 4 * world)
    count = len(_C.chunk_bounds(rows, chunks, K * 4)) - 1
    parameters: list[Event] = [("op", "mm"), ("op", "sum")]
    if count == 1:
        schedule, taken = [("op", "mm"), *AT_ONCE, *parameters], [f"{rows}x{K}"]
    else:
        pipeline = [event for i in range(count) for event in (("op", "mm"), ("launch", i))]
        schedule, taken = [*pipeline, *parameters, *(("wait", i) for i in range(count))], []

    def call(ops, group):
        layer = ([of_rank(dy)], x, [of_rank(w, 0)])
        return ops.column_linear_backward(*layer, True, [True], [True], group, chunks, "column")

    want = [dy @ w, of_rank(dy).t() @ x, of_rank(dy).sum(0)]
    name = f"column_linear_backward, {chunks} chunks, peers"
    return Case(name, call, want, schedule=schedule, peers=PLENTY, taken=taken)


def all_reduce_cases(rows: int) -> list[Case]:
    rng, rank = torch.Generator().manual_seed(rows), dist.get_rank()
    whole = random_integers(rng, dist.get_world_size(), rows, 6)
    turned = whole.transpose(1, 2)
    result = []
    for name, part, op, want in (
        ("sum", whole, "sum", whole.sum(0)),
        ("strided sum", turned, "sum", turned.sum(0)),
        ("max", whole, "max", whole.amax(0)),
        ("sum of integers", whole.long(), "sum", whole.long().sum(0)),
        ("sum of nothing", whole[:, :0], "sum", whole[0, :0]),
    ):

        def call(ops, group, part=part, op=op):
            buffer = part.clone()[rank]
            ops.all_reduce_(buffer, group, op, "sum")
            return [buffer]

        taken = [f"1x{rows * 6}"] if name in ("sum", "strided sum") else []
        schedule = AT_ONCE if want.numel() else []
        name = f"all_reduce_ {name}, peers"
        result.append(Case(name, call, [want], schedule=schedule, peers=PLENTY, taken=taken))
    return result


def embedding_case(rows: int) -> Case:
    rng, world = torch.Generator().manual_seed(rows), dist.get_world_size()
    ids = torch.randint(0, 3 * world, (rows,), generator=rng)
    table = random_integers(rng, 3 * world, 5)

    def call(ops, group):
        first = 3 * dist.get_rank()
        return [ops.vocab_embedding(ids, of_rank(table, 0), first, group, "embedding")]

    return Case(
        "vocab_embedding, peers",
        call,
        [table[ids]],
        schedule=AT_ONCE,
        peers=PLENTY,
        taken=[f"1x{rows * 5}"],
    )


def peer_cases(chunks: int, rows: int) -> list[Case]:
    if dist.get_world_size() == 1:
        return []
    too_small = rows * N * 4 - 4
    result = []
    for with_bias in (False, True):
        for with_residual in (False, True):
            for room, pieces in ((PLENTY, 1), (too_small, 1), (PLENTY, chunks)):
                result += row_cases(rows, room, pieces, with_bias, with_residual)
    result += [column_case(rows, 1), column_case(rows, chunks), *all_reduce_cases(rows)]
    embedding = embedding_case(rows)
    gone = "vocab_embedding, a group's peers that is gone"
    result += [embedding, replace(embedding, name=gone, peers=-PLENTY, taken=[])]
    # The maximum of the cross entropy is not a sum.
    taken = [f"1x{2 * rows}"]
    result.append(one_loss_case(chunks, rows, name="vocab_ce, peers", peers=PLENTY, taken=taken))
    return result
