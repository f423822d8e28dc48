"""Specifications of the Triton kernels' launches at typical sizes, to be compiled without a GPU.

A specification is recorded from the arguments that the op's launcher passes to the kernel, so it
cannot drift from it. To compile, leave TRITON_INTERPRET unset; to run `launch` on CPU tensors,
set it before triton is imported.
"""

from __future__ import annotations

import contextlib

import torch

from tpkernels.kernels import activation, column_linear, cross_entropy, dropout, norm, rotary

ROWS, HIDDEN, FFN, VOCAB = 256, 4096, 8192, 32768
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
CACHED = ("weight", "bias", "gate_bias", "up_bias", "seed")
ANNOTATED = {"tl.int64": "i64", "tl.uint32": "u32"}


def _random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, dtype=dtype)


def _activation(op, gated, separate=False, rows=ROWS, features=FFN):
    """Inputs of a forward or (`op` ends in backward) backward with bias."""
    act, width = ("swiglu", 2 * features) if gated else ("gelu_tanh", features)
    x, bias = _random(rows, width), _random(width)
    tensors = dict(zip(("gate", "up"), x.chunk(2, -1), strict=True)) if separate else dict(x=x)
    biases = (
        dict(zip(("gate_bias", "up_bias"), bias.chunk(2), strict=True))
        if separate
        else dict(bias=bias)
    )
    if op.endswith("backward"):
        inputs = dict(grad=_random(rows, features), **tensors, **biases)
        return inputs, lambda: activation.OPS[op](*inputs.values(), act, True)
    inputs = dict(**tensors, **biases)
    return inputs, lambda: activation.OPS[op](*inputs.values(), act)


def _norm(rms, features=HIDDEN, residual=True):
    inputs = dict(x=_random(ROWS, features), weight=_random(features))
    if residual:
        inputs["residual"] = _random(ROWS, features)
    if not rms:
        inputs["bias"] = _random(features)
    get = inputs.get
    return inputs, lambda: norm.norm(
        get("x"), get("residual"), get("weight"), get("bias"), 1e-6, rms
    )


def _norm_backward(rms, features=HIDDEN, rows=ROWS):
    inputs = {name: _random(rows, features) for name in ("grad", "grad_sum", "sum")}
    inputs |= dict(
        weight=_random(features),
        mean=_random(0 if rms else rows, dtype=torch.float32),
        rstd=torch.ones(rows),
    )
    return inputs, lambda: norm.norm_backward(*inputs.values(), rms, True, not rms)


def _logits():
    return dict(logits=_random(ROWS, VOCAB), target=torch.randint(VOCAB, (ROWS,)))


def _stats():
    inputs = _logits()
    return inputs, lambda: [cross_entropy.vocab_ce_stats(*inputs.values(), 0)]


def _grad(in_place):
    inputs = _logits() | dict(log_norm=torch.full((ROWS,), 11.0), scale=torch.ones(ROWS))
    if in_place:
        return inputs, lambda: [
            cross_entropy.vocab_ce_grad_(*inputs.values(), 0, 0.0, 1),
            inputs["logits"],
        ][1:]
    return inputs, lambda: [cross_entropy.vocab_ce_grad(*inputs.values(), 0, 0.0, 1)]


def _dropout():
    inputs = dict(x=_random(ROWS, HIDDEN), seed=torch.zeros(1, dtype=torch.int64))
    return inputs, lambda: [dropout.dropout(*inputs.values(), 0.1, 0, 0)]


def _rotary(interleaved, rotated):
    """Queries [B, H, T, D] as attention layers have them: a transposed view."""
    inputs = dict(
        x=_random(2, 64, 32, 128).transpose(1, 2),
        cos=_random(64, rotated // 2),
        sin=_random(64, rotated // 2),
    )
    return inputs, lambda: [rotary.rotary(*inputs.values(), interleaved, False)]


def _linear(act, keep):
    inputs = dict(x=_random(ROWS, HIDDEN), weight=_random(FFN, HIDDEN), bias=_random(FFN))
    return inputs, lambda: column_linear.column_linear_act(*inputs.values(), act, keep)


CASES = {
    "bias_act": lambda: _activation("bias_act", False),
    "bias_act gated": lambda: _activation("bias_act", True),
    "gated_act": lambda: _activation("gated_act", True, separate=True),
    "bias_act_backward": lambda: _activation("bias_act_backward", False),
    "bias_act_backward gated": lambda: _activation("bias_act_backward", True),
    "gated_act_backward": lambda: _activation("gated_act_backward", True, separate=True),
    "norm rms": lambda: _norm(True),
    "norm rms, no residual": lambda: _norm(True, residual=False),
    "norm": lambda: _norm(False),
    "norm 16384": lambda: _norm(False, 16384),
    "norm_backward rms": lambda: _norm_backward(True),
    "norm_backward": lambda: _norm_backward(False),
    "norm_backward 8192": lambda: _norm_backward(False, 8192),
    "vocab_ce_stats": _stats,
    "vocab_ce_grad": lambda: _grad(False),
    "vocab_ce_grad_": lambda: _grad(True),
    "dropout": _dropout,
    "rotary": lambda: _rotary(False, 128),
    "rotary interleaved": lambda: _rotary(True, 128),
    "rotary partial": lambda: _rotary(False, 64),
}
# A training step has as many rows; partial sums then add little to the bytes.
TALL = {
    "bias_act_backward, 4096 rows": lambda: _activation(
        "bias_act_backward", False, rows=4096, features=1024
    ),
    "bias_act_backward gated, 4096 rows": lambda: _activation(
        "bias_act_backward", True, rows=4096, features=1024
    ),
    "norm_backward rms, 4096 rows": lambda: _norm_backward(True, 1024, 4096),
    "norm_backward, 4096 rows": lambda: _norm_backward(False, 1024, 4096),
}
# Beyond what fits in registers: a tensor is read again, from L2 where it still is.
LONG = {
    "norm 32768": lambda: _norm(False, 32768),
    "norm_backward 16384": lambda: _norm_backward(False, 16384),
}
GEMMS = {
    "column_linear_act": lambda: _linear("gelu_tanh", True),
    "column_linear_act gated": lambda: _linear("swiglu", True),
}


@contextlib.contextmanager
def recorded_launches():
    """Record launches as (kernel, positional, keyword arguments) instead of running them."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append((self, args, kwargs))

    kind = type(norm.norm_kernel)  # to compile or to interpret
    real, kind.run = kind.run, run
    try:
        yield launches
    finally:
        kind.run = real


def _specification(kernel, args, kwargs) -> dict:
    """Specialise as triton's launcher does.

    None and 1 become constants, and values divisible by 16 are marked so.
    """
    names, annotations = kernel.arg_names, kernel.fn.__annotations__
    options = {name: kwargs[name] for name in ("num_warps", "num_stages") if name in kwargs}
    values = dict(zip(names, args, strict=False)) | {
        name: value for name, value in kwargs.items() if name not in options
    }
    signature, constexprs, divisible = {}, {}, []
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif (
            value is None
            or annotations.get(name) == "tl.constexpr"
            or (value == 1 and name not in annotations)
        ):
            constexprs[name] = value
        else:
            signature[name] = (
                ANNOTATED[annotations[name]]
                if name in annotations
                else "i32"
                if -(2**31) <= value < 2**31
                else "i64"
            )
            if value % 16 == 0:
                divisible.append(name)
    return dict(
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=divisible,
        **{"num_warps": 4, "num_stages": 3, **options},
    )


def _launch(case) -> dict:
    inputs, call = case()
    outputs = call()
    return dict(inputs=inputs, outputs={str(i): t for i, t in enumerate(outputs)})


def specs() -> list[dict]:
    """Return a dict for each kernel that each case launches.

    Its keys: name, kernel, signature (argument -> Triton type), constexprs, num_warps,
    num_stages, divisible (arguments that are multiples of 16), kind, cached (inputs that stay in
    a cache), scratch (bytes of partial sums) and launch. `launch` runs the op on CPU tensors by
    Triton's interpreter and returns dict(inputs={name: tensor}, outputs={name: tensor}).
    """
    found = []
    for name, case in (CASES | TALL | LONG | GEMMS).items():
        inputs, call = case()
        with recorded_launches() as launches:
            call()
        scratch = sum(
            t.nbytes
            for kernel, args, _ in launches
            if kernel.__name__ == "sum_partials_kernel"
            for t in args[:1]
        )
        found += [
            dict(
                name=f"{name}: {kernel.__name__}",
                **_specification(kernel, args, kwargs),
                kind="memory"
                if name in CASES | TALL
                else "gemm"
                if name in GEMMS
                else "memory, read again",
                launch=lambda case=case: _launch(case),
                cached=[name for name in inputs if name in CACHED],
                scratch=scratch,
            )
            for kernel, args, kwargs in launches
        ]
    return found
