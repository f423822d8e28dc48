"""No call of an op ends the process: what is refused, and malformed calls drawn at random."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
import torch.distributed as dist
from op_samples import half, rand
from pool import run_on_ranks
from refusal import assert_refused

import tpkernels  # noqa: F401  (registers the ops)

OPS = torch.ops.tpkernels
SCALAR = torch.tensor(1.0)
META = torch.ones(6, device="meta")
SEED = "20261126"


def freed(*shape):
    t = rand(*shape)
    t.untyped_storage().resize_(0)
    return t


def row(x=None, w=None, bias=None, residual=None, chunks=1):
    x = rand(5, 8) if x is None else x
    w = rand(6, 8) if w is None else w
    return OPS.row_linear(x, w, bias, residual, dist.group.WORLD.group_name, chunks, "t")


def column(dys, x, weights, wanted=(True, True), weight_grad=None, bias_grad=None, chunks=1):
    """Ask for the gradients of the input and, by default, of all weights."""
    weight_grad = [wanted[1]] * len(dys) if weight_grad is None else weight_grad
    bias_grad = weight_grad if bias_grad is None else bias_grad
    group = dist.group.WORLD.group_name
    return OPS.column_linear_backward(
        dys, x, weights, wanted[0], weight_grad, bias_grad, group, chunks, "t"
    )


def loss(chunk_rows=4, scale=None, smoothing=0.0, classes=11, grads=(False, False, False)):
    target = torch.zeros(5, dtype=torch.long)
    numbers = 0, classes, -100, smoothing, chunk_rows
    group = dist.group.WORLD.group_name
    return OPS.vocab_linear_ce(
        rand(5, 8), rand(11, 8), None, target, scale, *numbers, *grads, group, "t"
    )


def dropped(seed=None, p=0.5, row=0):
    return OPS.dropout(rand(2, 3), torch.tensor([1]) if seed is None else seed, p, row, 0)


def rotated(x=None, cos=None, sin=None):
    cos = rand(5, 2) if cos is None else cos
    sin = rand(5, 2) if sin is None else sin
    return OPS.rotary(rand(1, 2, 5, 4) if x is None else x, cos, sin, False, False)


def grad_in_place(logits, log_norm):
    OPS.vocab_ce_grad_(logits, torch.zeros(6).long(), log_norm, rand(6), 0, 0.0, 10)


def buffer():
    return torch.zeros(2, 6)


REFUSED = {  # a call -> the exception, and words of its message
    "row of a scalar": (lambda: row(SCALAR), ValueError, "input", "at least one dimension"),
    "row of integers": (lambda: row(rand(5, 8).long()), TypeError, "input", "Long"),
    "row, another K": (lambda: row(rand(5, 7)), ValueError, "[5, 7]", "[6, 8]"),
    "row, weight 1-d": (lambda: row(w=rand(8)), ValueError, "weight", "2 dimensions", "[8]"),
    "row, weight meta": (lambda: row(w=META), ValueError, "weight is on meta", "on cpu"),
    "row, weight half": (lambda: row(w=half(6, 8)), TypeError, "weight is BFloat16", "Float"),
    "row, weight freed": (lambda: row(w=freed(6, 8)), ValueError, "weight", "192 bytes", "has 0"),
    "row, weight sparse": (lambda: row(w=rand(6, 8).to_sparse()), ValueError, "weight", "dense"),
    "row, short bias": (lambda: row(bias=rand(1)), ValueError, "bias", "[6]", "[1]"),
    "row, long bias": (lambda: row(bias=rand(12)), ValueError, "bias", "[6]", "[12]"),
    "row, double bias": (lambda: row(bias=rand(6).double()), TypeError, "bias is Double", "Float"),
    "row, integer residual": (lambda: row(residual=rand(5, 6).long()), TypeError, "residual"),
    "row, half residual": (lambda: row(residual=half(5, 6)), TypeError, "residual is BFloat16"),
    "row, one row of residual": (lambda: row(residual=rand(6)), ValueError, "residual", "[5, 6]"),
    "row, no chunk": (lambda: row(chunks=0), ValueError, "chunks", "at least 1", "got 0"),
    "row backward of a scalar": (
        lambda: OPS.row_linear_backward(SCALAR, None, rand(6, 8), False),
        ValueError,
        "grad_output",
    ),
    "row backward, other rows": (
        lambda: OPS.row_linear_backward(rand(5, 6), rand(4, 8), None, False),
        ValueError,
        "input",
        "[5, 8]",
    ),
    "row backward, weight": (
        lambda: OPS.row_linear_backward(rand(5, 6), None, rand(7, 8), False),
        ValueError,
        "weight",
        "[6, 8]",
    ),
    "column backward of none": (
        lambda: column([], rand(5, 8), []),
        ValueError,
        "grad_outputs",
        "none",
    ),
    "column backward, no weights": (
        lambda: column([rand(5, 6)], rand(5, 8), []),
        ValueError,
        "weights",
        "got 0",
    ),
    "column backward, 1 of 2": (
        lambda: column([rand(5, 6)] * 2, rand(5, 8), [rand(6, 8)]),
        ValueError,
        "weights",
        "2 grad_outputs",
        "got 1",
    ),
    "column backward, flags": (
        lambda: column([rand(5, 6)], rand(5, 8), [rand(6, 8)], weight_grad=[True] * 2),
        ValueError,
        "weight_grad and bias_grad",
        "got 2 and 2",
    ),
    "column backward, no input": (
        lambda: column([rand(5, 6)], None, [rand(6, 8)]),
        ValueError,
        "needs input",
    ),
    "column backward, other rows": (
        lambda: column([rand(5, 6), rand(4, 6)], rand(5, 8), [rand(6, 8)] * 2),
        ValueError,
        "grad_outputs",
        "[5, 6]",
        "[4, 6]",
    ),
    "column backward, other K": (
        lambda: column([rand(5, 6)] * 2, rand(5, 8), [rand(6, 8), rand(6, 7)]),
        ValueError,
        "weights",
        "[6, 8]",
        "[6, 7]",
    ),
    "column backward, input's K": (
        lambda: column([rand(5, 6)], rand(5, 7), [rand(6, 8)]),
        ValueError,
        "input",
        "[5, 8]",
        "[5, 7]",
    ),
    "column backward, no chunk": (
        lambda: column([rand(5, 6)], rand(5, 8), [rand(6, 8)], chunks=-1),
        ValueError,
        "chunks",
        "got -1",
    ),
    "column act of odd halves": (
        lambda: OPS.column_linear_act(rand(5, 8), rand(7, 8), None, "swiglu", True),
        ValueError,
        "swiglu",
        "7 rows",
    ),
    "column act, no such name": (
        lambda: OPS.column_linear_act(rand(5, 8), rand(6, 8), None, "tanh", True),
        ValueError,
        "activation",
        "'tanh'",
    ),
    "epilogue in strides": (
        lambda: OPS.add_bias_residual_(rand(6, 2).t(), rand(6), rand(2, 6)),
        ValueError,
        "contiguous",
        "[1, 2]",
    ),
    "epilogue with its own bias": (
        lambda: OPS.add_bias_residual_(b := buffer(), b[0], rand(2, 6)),
        ValueError,
        "bias shares memory with self",
    ),
    "epilogue over its residual": (
        lambda: OPS.add_bias_residual_((b := rand(3, 6))[:2], rand(6), b[1:]),
        ValueError,
        "residual shares some memory",
    ),
    "norm of a scalar": (
        lambda: OPS.norm(SCALAR, None, None, None, 1e-5, True),
        ValueError,
        "input",
    ),
    "norm, weight meta": (
        lambda: OPS.norm(rand(2, 6), None, META, None, 1e-5, True),
        ValueError,
        "weight is on meta",
    ),
    "norm, half residual": (
        lambda: OPS.norm(rand(2, 6), half(2, 6), None, None, 1e-5, True),
        TypeError,
        "residual is BFloat16",
    ),
    "norm backward, no mean": (
        lambda: OPS.norm_backward(
            rand(2, 6), None, rand(2, 6), None, rand(0), rand(2), False, False, False
        ),
        ValueError,
        "mean",
        "[2]",
        "[0]",
    ),
    "norm backward, short rstd": (
        lambda: OPS.norm_backward(
            rand(2, 6), None, rand(2, 6), None, rand(0), rand(1), True, False, False
        ),
        ValueError,
        "rstd",
        "[2]",
        "[1]",
    ),
    "gated act of two dtypes": (
        lambda: OPS.gated_act(rand(2, 6), half(2, 6), None, None, "swiglu"),
        TypeError,
        "up is BFloat16",
    ),
    "gated act backward, other grad": (
        lambda: OPS.gated_act_backward(
            rand(2, 5), rand(2, 6), rand(2, 6), None, None, "geglu", False
        ),
        ValueError,
        "grad",
        "[2, 6]",
    ),
    "bias act backward, other grad": (
        lambda: OPS.bias_act_backward(rand(2, 6), rand(2, 6), None, "swiglu", False),
        ValueError,
        "grad",
        "[2, 3]",
    ),
    "dropout, two seeds": (lambda: dropped(torch.tensor([1, 2])), ValueError, "seed", "got 2"),
    "dropout, float seed": (lambda: dropped(torch.ones(1)), ValueError, "seed", "Float"),
    "dropout, p of nan": (lambda: dropped(p=float("nan")), ValueError, "p must lie in [0, 1]"),
    "dropout, row -1": (lambda: dropped(row=-1), ValueError, "row and column", "-1"),
    "rotary of 3 dimensions": (lambda: rotated(rand(2, 5, 4)), ValueError, "[B, H, T, D]"),
    "rotary, wide tables": (lambda: rotated(cos=rand(5, 3), sin=rand(5, 3)), ValueError, "cos"),
    "rotary, other steps": (lambda: rotated(cos=rand(4, 2), sin=rand(4, 2)), ValueError, "cos"),
    "rotary, flat cos": (lambda: rotated(cos=rand(2)), ValueError, "cos", "[T, R/2]"),
    "rotary, other sin": (lambda: rotated(sin=rand(5, 1)), ValueError, "sin", "[5, 2]"),
    "loss, no chunk": (lambda: loss(0), ValueError, "chunk_rows", "got 0"),
    "loss, no scale": (lambda: loss(grads=(True, False, False)), ValueError, "need scale"),
    "loss, no bias": (
        lambda: loss(scale=rand(5), grads=(False, False, True)),
        ValueError,
        "bias_grad needs bias",
    ),
    "loss, short scale": (lambda: loss(scale=rand(4)), ValueError, "scale", "[5]", "[4]"),
    "loss, smoothing": (lambda: loss(smoothing=1.5), ValueError, "smoothing", "1.5"),
    "loss, no class": (lambda: loss(classes=-1), ValueError, "num_classes", "got -1"),
    "loss gradient over its norm": (
        lambda: grad_in_place(z := rand(6, 6), z[0]),
        ValueError,
        "log_norm shares memory with logits",
    ),
    "loss gradient of one element": (
        lambda: grad_in_place(rand(1, 1).expand(6, 6), rand(6)),
        ValueError,
        "logits",
        "elements that share memory",
    ),
    "stats, 3 dimensions": (
        lambda: OPS.vocab_ce_stats(rand(2, 3, 4), torch.zeros(2).long(), 0),
        ValueError,
        "logits",
        "2 dimensions",
    ),
    "stats, float target": (
        lambda: OPS.vocab_ce_stats(rand(2, 3), torch.zeros(2), 0),
        TypeError,
        "target",
        "int32 or int64",
    ),
    "stats, start -1": (
        lambda: OPS.vocab_ce_stats(rand(2, 3), torch.zeros(2).long(), -1),
        ValueError,
        "vocab_start_index",
        "-1",
    ),
    "embedding of floats": (
        lambda: OPS.vocab_embedding(rand(2), rand(3, 4), 0, dist.group.WORLD.group_name, "t"),
        TypeError,
        "ids",
        "Float",
    ),
    "sum of one element": (
        lambda: OPS.all_reduce_(SCALAR.expand(4), dist.group.WORLD.group_name, "sum", "t"),
        ValueError,
        "self",
        "elements that share memory",
    ),
    "sum in another group": (
        lambda: OPS.all_reduce_(rand(4), "no such group", "sum", "t"),
        RuntimeError,
        "no such group",
    ),
    "gather of sparse": (
        lambda: OPS.all_gather(rand(4).to_sparse(), dist.group.WORLD.group_name, "t"),
        ValueError,
        "self must be dense",
    ),
    "cast of freed memory": (lambda: OPS.autocast_to(freed(4), torch.half), ValueError, "freed"),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
@run_on_ranks(2, pool="shm_pool")
def test_refused(case):
    call, kind, *words = REFUSED[case]
    assert_refused(call, kind, *words)


def test_random_calls_on_one_rank():
    report = fuzz.run(["--calls", "24", "--seed", SEED])
    assert report["problems"] == []
    assert report["counts"].keys() == set(fuzz.op_names())
    total = sum(sum(kinds.values()) for kinds in report["counts"].values())
    assert total == 24 * len(fuzz.op_names())
    schema = sum(kinds["schema"] for kinds in report["counts"].values())
    assert schema < 0.4 * total, "too few calls come past the schemas"


def test_random_calls_on_two_ranks():
    report = fuzz.run(["--pairs", "40", "--seed", SEED])
    assert report["problems"] == []
    assert sum(sum(kinds.values()) for kinds in report["counts"].values()) == 40


# A process does this to a buffer of 7 floats at `begin` -> words about its end. By turns a buffer
# ends where a guard page begins and begins where one ends.
FAULTS = {
    "reads behind": ("ctypes.string_at(begin + 28, 4)", "SIGSEGV"),
    "reads before": ("ctypes.string_at(begin - 4, 4)", "SIGSEGV"),
    "writes behind": ("ctypes.memset(begin + 28, 1, 4)", "outside of a buffer"),
    "writes before": ("ctypes.memset(begin - 4, 1, 4)", "outside of a buffer"),
    "hangs": ("time.sleep(60)", "hang"),
    "leaves": ("os._exit(3)", "exit code 3"),
}
FAULTY_PROCESS = """
import ctypes, json, os, sys, time
import fuzz, torch

def outcome(name, code):
    def fault():
        ends_at_page = name in ("reads behind", "writes before")
        while ((t := torch.ones(7)).data_ptr() % 4096 != 0) != ends_at_page:
            pass
        exec(code, {**globals(), "begin": t.data_ptr()})
        del t
        return {"problem": None}
    return fuzz.Child(fault).result(time.monotonic() + 3)["problem"]

print(json.dumps({name: outcome(name, code) for name, code in json.loads(sys.argv[1]).items()}))
"""


def test_the_fuzzer_sees_faults():
    codes = {name: code for name, (code, _) in FAULTS.items()}
    command = [sys.executable, "-c", FAULTY_PROCESS, json.dumps(codes)]
    with fuzz.guarded_memory() as environment:
        environment["PYTHONPATH"] = str(Path(fuzz.__file__).parent)
        found = json.loads(subprocess.check_output(command, env=environment, timeout=120))
    for name, (_, words) in FAULTS.items():
        assert words in (found[name] or ""), f"{name}: {found[name]}"
