"""The overlap engine under NCCL's semantics, without a GPU: see deferred.py. Mutants of the engine prove that the checks bite."""

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deferred import MODES, Trace, deferred
from torch import Tensor
from torch.utils import cpp_extension

from tpkernels import _C

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Case:
    """A call of an op of the engine. `launches`: collectives in flight at once, or up to the error where `error` (a regex) is expected."""

    name: str
    call: Callable  # (torch.ops.<library>, group name) -> list of results
    want: list[Tensor]
    launches: int
    error: str | None = None
    options: dict = field(default_factory=dict)  # of the deferred group
    trace: bool = True
    epilogue: str | None = None  # the op that must ride under the later chunks' collectives


def cases(chunks: int, rows: int) -> list[Case]:
    """Integer-valued data, the same whole on every rank: every sum is exact in float32 in any order."""
    world, rank = dist.get_world_size(), dist.get_rank()
    rng = torch.Generator().manual_seed(rows)

    def integers(*shape):
        return torch.randint(-3, 4, shape, generator=rng).float()

    def mine(t, dim=-1):
        return t.chunk(world, dim)[rank]

    def launches(features):
        return len(_C.chunk_bounds(rows, chunks, features * 4)) - 1 if world > 1 and rows else 0

    result = []
    lead, n, k = (2, rows // 2) if rows % 2 == 0 else (rows,), 11, 13
    x, w, b, residual = integers(*lead, 5 * world), integers(n, 5 * world), integers(n), integers(*lead, n)
    x_i, w_i, flight = mine(x), mine(w), launches(n)

    def row(bias, rest, **options):
        want = F.linear(x, w, bias) if rest is None or rest.shape != residual.shape else F.linear(x, w, bias) + rest
        name = f"row_linear bias={bias is not None} residual={rest is not None}"
        epilogue = None if rest is None else "add" if bias is None else "add_bias_residual"
        call = lambda ops, group: [ops.row_linear(x_i, w_i, bias, rest, group, chunks, "row")]  # noqa: E731
        return Case(name, call, [want], **{"launches": flight, "epilogue": epilogue, **options})

    result += [row(bias, rest) for bias in (None, b) for rest in (None, residual)]

    inner = integers(*lead, k)  # the column-parallel layers' input
    ws, dys = [integers(m * world, k) for m in (4, 3, 2)], [integers(*lead, m * world) for m in (4, 3, 2)]
    dx = sum(dy @ weight for dy, weight in zip(dys, ws, strict=True))
    ws_i, dys_i = [mine(t, 0) for t in ws], [mine(t) for t in dys]
    flat = [dy.reshape(rows, dy.shape[-1]) for dy in dys_i]
    dws, dbs = [dy.t() @ inner.reshape(rows, k) for dy in flat], [dy.sum(0) for dy in flat]
    column_flight = launches(k)

    def column(dys, x, weights, need_x, need_w, need_b, want=(), **options):
        name = f"column_linear_backward layers={len(dys)} dx={need_x} dw={need_w} db={need_b}"
        call = lambda ops, group: ops.column_linear_backward(dys, x, weights, need_x, need_w, need_b, group, chunks, "column")  # noqa: E731
        return Case(name, call, list(want), **{"launches": column_flight if need_x else 0, **options})

    yes, no = [True] * 3, [False] * 3
    result.append(column(dys_i, inner, ws_i, True, yes, yes, [dx, *dws, *dbs]))
    result.append(column(dys_i, inner, ws_i, True, [False, True, False], [True, False, False], [dx, dws[1], dbs[0]]))
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
    embedding = lambda ops, group: [ops.vocab_embedding(ids, mine(table, 0), 3 * rank, group, "embedding")]  # noqa: E731
    result.append(Case("vocab_embedding", embedding, [table[ids]], one if rows else 0))

    # An error from the collective itself, which NCCL reports at the wait, comes out of the op.
    for case in list(result):
        for i in sorted({0, case.launches - 1}) if case.launches else ():
            result.append(replace(case, name=f"{case.name}, wait {i} fails", options={"fail_wait": i}, error=f"^wait {i}$"))
    # Errors with collectives in flight. What C++ raises inside the engine must not meet Trace.
    if column_flight:
        broken = dict(error="shapes cannot be multiplied", trace=False)
        result.append(
            replace(column(dys_i, inner[..., :-1, :], ws_i, True, yes, yes, **broken), name="column_linear_backward, dw's GEMM throws")
        )
        if column_flight > 1:
            last = dict(launches=column_flight - 1)
            short = column(
                [flat[0], flat[1][:-1]], None, ws_i[:2], True, no[:2], no[:2], error="exceeds dimension size", trace=False, **last
            )
            result.append(replace(short, name="column_linear_backward, the last chunk of a layer is short"))
            failing = column(dys_i, None, ws_i, True, no, no, error="^launch", options={"fail_launch": column_flight - 1}, **last)
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
        failing = row(b, residual, error="^launch", options={"fail_launch": flight - 1}, launches=flight - 1)
        result.append(replace(failing, name="row_linear, the last launch fails"))
        shrunk = b.clone()  # only the first rank's GEMM takes the bias: every rank says it is the first
        shrink = {"rank": 0, "on_launch": lambda i: shrunk.resize_(0) if i == 0 else None}
        failing = row(shrunk, None, error="expanded size", launches=1, options=shrink, trace=False)
        result.append(replace(failing, name="row_linear, a GEMM throws"))
    return result


HIDDEN = ("mm", "addmm", "sum")  # what collectives hide under: all of it is issued before the first wait


def check(case: Case, library: str, mode: str) -> list[str]:
    """What is wrong with the op of torch.ops.<library>."""
    got, error = None, None
    with deferred(mode, **case.options) as group:
        try:
            with Trace(group) if case.trace else nullcontext():
                got = case.call(getattr(torch.ops, library), group.registered_name)
        except Exception as caught:
            error = caught
    found, events = list(group.violations), group.events
    if case.error is None and error is not None:
        found.append(f"raised {error!r}")
    elif case.error is not None and not re.search(case.error, str(error)):
        found.append(f"raised {error!r} instead of {case.error!r}")
    if case.error is None and got is not None and not (len(got) == len(case.want) and all(map(torch.equal, got, case.want))):
        found.append("wrong result")
    if len(group.works) != case.launches:
        found.append(f"{len(group.works)} collectives, not {case.launches}")
    elif group.max_in_flight != case.launches:
        found.append(f"{group.max_in_flight} of {case.launches} collectives in flight at once")
    after = events[next((i for i, (what, _) in enumerate(events) if what == "wait"), len(events)) :]
    if late := [name for _, name in after if name in HIDDEN]:
        found.append(f"{late[0]} was issued after a wait")
    in_turn = [event for i in range(case.launches) for event in (("wait", i), ("op", case.epilogue))]
    if case.error is None and case.epilogue and after and after != in_turn:
        found.append("chunk i's epilogue was not issued between the waits for i and i + 1")
    return [f"{case.name}: {text}" for text in found]


def run_engine(mode, chunks):
    # Fewer rows than a GEMM tile, boundaries at 128, one row, none; the last chunk is ragged.
    return [text for rows in (37, 300, 1, 0) for case in cases(chunks, rows) for text in check(case, "tpkernels", mode)]


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_engine_waits_for_each_collective_once_and_where_it_must(pool, ranks, mode, chunks):
    assert pool.run(ranks, run_engine, mode, chunks) == [[]] * ranks


# (what is broken, text of the engine, text put in its place, ...); each text occurs once in the engine. A wait that is left to
# Pending's destructor gives the right values wherever nothing follows it, but loses the collective's error. The order of Pending's
# members alone is no mutant: the destructor has waited before it frees either.
ROW_LAUNCH = "    pending.push_back(channel.all_reduce(slice, i));\n  }\n  // Every GEMM"
ROW_WAIT = "    pending[i].wait();\n"
ROW_EPILOGUE = "  for (size_t i = 0; i < count; i++) {\n    pending[i].wait();\n    if (!rest) continue;\n"
COLUMN_LAUNCH = "      pending.push_back(channel.all_reduce(slice, i));\n    }\n    auto shape"
COLUMN_WAIT = "  for (auto& p : pending) p.wait();\n  return grads;"
COLUMN_SIBLINGS = "      for (size_t j = 1; j < dys.size(); j++) slice.addmm_(slice_rows(dys[j], bounds, i), weights[j]);\n"
LEAK = "new std::vector<Pending>(std::move(pending));"
REDUCE = "  Channel(group, tag).all_reduce(buffer, 0, op == "
REDUCE_WAIT = "c10d::ReduceOp::MAX).wait();\n  if (!self.is_contiguous()) self.copy_(buffer);"
DESTRUCTOR = "    try {\n      wait();\n    } catch (...) {"
HOLD = "tensors_(std::move(tensors)), work_(std::move(work)) {}"
WAIT = "    auto work = std::move(work_);\n    if (work) work->wait();\n    tensors_.clear();"
GATHER = "  channel.all_gather(out, self.contiguous()).wait();"
EMBEDDING = "Channel(group, tag).all_reduce(out).wait();"

MUTANTS: list[tuple[str, ...]] = [
    ("row_linear: wait left to the destructor", ROW_WAIT, ""),
    (
        "row_linear: never waits",
        ROW_WAIT,
        "",
        "  return out.view(shape);\n}\n\nat::Tensor vocab",
        f"  {LEAK}\n  return out.view(shape);\n}}\n\nat::Tensor vocab",
    ),
    ("row_linear: waits before the next GEMM", ROW_LAUNCH, ROW_LAUNCH.replace("\n  }", "\n    pending.back().wait();\n  }", 1)),
    ("row_linear: waits one chunk behind", ROW_LAUNCH, ROW_LAUNCH.replace("\n  }", "\n    if (i > 0) pending[i - 1].wait();\n  }", 1)),
    (
        "row_linear: launches before the GEMM",
        "    if (gemm_adds_bias) {",
        "    pending.push_back(channel.all_reduce(slice, i));\n    if (gemm_adds_bias) {",
        ROW_LAUNCH,
        "  }\n  // Every GEMM",
    ),
    (
        "row_linear: epilogue before its wait",
        ROW_EPILOGUE,
        ROW_EPILOGUE.replace(ROW_WAIT, ""),
        "      slice.add_(rest_i);\n    }\n",
        "      slice.add_(rest_i);\n    }\n    pending[i].wait();\n",
    ),
    ("row_linear: epilogue after the previous chunk's wait", ROW_WAIT, "    if (i > 0) pending[i - 1].wait();\n"),
    ("row_linear: waits for the first chunk only", ROW_WAIT, "    pending[0].wait();\n"),
    ("row_linear: all waits before the epilogue", ROW_WAIT, "    for (auto& p : pending) p.wait();\n"),
    ("column_linear_backward: wait left to the destructor", COLUMN_WAIT, "  return grads;"),
    ("column_linear_backward: never waits", COLUMN_WAIT, f"  {LEAK}\n  return grads;"),
    (
        "column_linear_backward: waits before the next GEMM",
        COLUMN_LAUNCH,
        COLUMN_LAUNCH.replace("\n    }", "\n      pending.back().wait();\n    }", 1),
    ),
    (
        "column_linear_backward: waits before the weights' GEMMs",
        COLUMN_LAUNCH,
        COLUMN_LAUNCH.replace("    }\n", "    }\n    for (auto& p : pending) p.wait();\n"),
    ),
    (
        "column_linear_backward: launches before the other layers' GEMMs",
        COLUMN_SIBLINGS,
        "",
        COLUMN_LAUNCH,
        COLUMN_LAUNCH.replace("\n    }", f"\n{COLUMN_SIBLINGS}    }}", 1),
    ),
    ("all_reduce_: wait left to the destructor", REDUCE_WAIT, REDUCE_WAIT.replace(".wait()", "")),
    (
        "all_reduce_: never waits",
        REDUCE,
        REDUCE.replace("Channel(", "new Pending(Channel("),
        REDUCE_WAIT,
        REDUCE_WAIT.replace(".wait()", ")"),
    ),
    (
        "all_reduce_: copies back before the wait",
        REDUCE,
        REDUCE.replace("Channel(", "auto p = Channel("),
        REDUCE_WAIT,
        REDUCE_WAIT.replace(".wait()", "") + "\n  p.wait();",
    ),
    ("all_gather: wait left to the destructor", GATHER, GATHER.replace(".wait()", "")),
    ("all_gather: never waits", GATHER, "  new Pending(channel.all_gather(out, self.contiguous()));"),
    (
        "all_gather: its shard is freed before its wait",
        "{flat_out, flat_shard}",
        "{flat_out}",
        GATHER,
        GATHER.replace("channel", "auto p = channel").replace(".wait()", "; p.wait()"),
    ),
    ("vocab_embedding: wait left to the destructor", EMBEDDING, EMBEDDING.replace(".wait()", "")),
    (
        "vocab_embedding: zeros others' rows in flight",
        "    out.masked_fill_(outside.unsqueeze(1), 0);\n",
        "",
        EMBEDDING,
        "auto p = Channel(group, tag).all_reduce(out);\n  out.masked_fill_(outside.unsqueeze(1), 0);\n  p.wait();",
    ),
    ("all_reduce: not asynchronous", "  options.asyncOp = true;  // NCCL", "  options.asyncOp = false;  // NCCL"),
    (
        "all_gather: not asynchronous",
        "  c10d::AllgatherOptions options;\n  options.asyncOp = true;",
        "  c10d::AllgatherOptions options;\n  options.asyncOp = false;",
    ),
    ("Pending: does not hold its tensors", HOLD, "work_(std::move(work)) {}"),
    ("Pending: frees its tensors before its wait", WAIT, "    tensors_.clear();\n" + WAIT),
    ("Pending: destructor frees its tensors before its wait", DESTRUCTOR, "    tensors_.clear();\n" + DESTRUCTOR),
    ("Pending: destructor does not wait", DESTRUCTOR, DESTRUCTOR.replace("wait();", "")),
    ("Pending: waits twice", WAIT, WAIT.replace("work->wait();", "work->wait(), work->wait();")),
    ("Pending: keeps its work after the wait", WAIT, WAIT.replace("std::move(work_)", "work_")),
    ("Pending: waits again after a wait that throws", WAIT, "    if (work_) work_->wait();\n    work_.reset();\n    tensors_.clear();"),
    (
        "Pending: moving it copies its work",
        "Pending(Pending&&) = default;",
        "Pending(Pending&& other) : tensors_(other.tensors_), work_(other.work_) {}",
    ),
]

SOURCES = ("comm.cpp", "linear.cpp")


def engine_text(name: str, seen: set[str], system: dict[str, None]) -> str:
    """A source with its own headers in their places; other headers, but for those inside an #if, are collected in `system`."""
    seen.add(name)
    text, conditional = "", False
    for line in (ROOT / "csrc/overlap" / name).read_text().splitlines(keepends=True):
        if own := re.match(r'#include "(.+)"', line):
            text += "" if own[1] in seen else engine_text(own[1], seen, system)
        elif line.startswith("#include") and not conditional:
            system[line] = None
        elif not line.startswith("#pragma once"):
            conditional = line.startswith("#if") or (conditional and not line.startswith("#endif"))
            text += line
    return text


def mutants_source() -> str:
    """One translation unit: the engine in a namespace for each mutant, its ops in torch.ops.tpk_mutant_<i>. Mutant 0 is not mutated."""
    system, seen = {"#include <torch/library.h>\n": None}, set()
    engine = "".join(engine_text(name, seen, system) for name in SOURCES)
    registration = (ROOT / "csrc/registration.cpp").read_text()
    literals = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)', registration)
    schemas = {schema.partition("(")[0]: schema for schema in ("".join(re.findall('"(.*?)"', literal)) for literal in literals)}
    ops = [(name, f) for name, f in re.findall(r'm\.impl\("(\w+)", &tpkernels::(\w+)\)', registration) if re.search(rf"\b{f}\(", engine)]
    assert len(ops) >= 5, ops
    text = "".join(system)
    for i, (name, *edits) in enumerate([("the engine",), *MUTANTS]):
        copy = engine
        for old, new in zip(edits[::2], edits[1::2], strict=True):
            assert engine.count(old) == copy.count(old) == 1, f"mutant '{name}' does not fit the engine: {engine.count(old)} times {old!r}"
            copy = copy.replace(old, new)
        text += re.sub(r"^((}  // )?namespace) tpkernels\b", rf"\1 mutant_{i}", copy, flags=re.M)
        text += f"TORCH_LIBRARY_FRAGMENT(tpk_mutant_{i}, m) {{\n"
        text += "".join(f'  m.def("{schemas[op]}", torch::dispatch(c10::DispatchKey::CPU, &mutant_{i}::{f}));\n' for op, f in ops) + "}\n"
    return text


def build(source: str) -> str:
    """The library built from `source`, from the cache if it is there."""
    folder = ROOT / "build" / "mutants"
    name = "mutants_" + hashlib.sha256((source + torch.__version__).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as here:  # a folder of its own: an interrupted build leaves no lock behind
            code = Path(here) / "mutants.cpp"
            code.write_text(source)
            cpp_extension.load(name, [str(code)], ["-O0", "-g0", "-w"], build_directory=here, is_python_module=False)
            for old in folder.glob("mutants_*.so"):
                old.unlink(missing_ok=True)
            os.replace(Path(here) / library.name, library)
    return str(library)


def run_mutants(library, mode, mutants):
    torch.ops.load_library(library)
    return {i: [text for case in cases(3, 50) for text in check(case, f"tpk_mutant_{i}", mode)] for i in mutants}


def test_every_mutant_of_the_engine_is_caught(pool, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "2")
    library, found, alive = build(mutants_source()), {}, list(range(1 + len(MUTANTS)))
    for mode in MODES:  # what dies in the first is not run in the second
        ranks = pool.run(2, run_mutants, library, mode, alive)
        found.update({i: [text for rank in ranks for text in rank[i]] for i in alive})
        assert not found[0], found[0]  # the engine, built in the same way, passes
        alive = [i for i in alive if not found[i]]
    print()
    for i, (name, *_) in enumerate(MUTANTS, 1):
        print(f"  {name}: {f'{found[i][0]} (of {len(found[i])})' if found[i] else 'SURVIVED'}")
    survivors = [MUTANTS[i - 1][0] for i in alive if i]
    print(f"mutants killed: {len(MUTANTS) - len(survivors)} / {len(MUTANTS)}")
    assert not survivors
