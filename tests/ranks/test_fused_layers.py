"""The fused norms, activations and rotary embedding as autograd Functions and modules, on one rank and split."""

import itertools

import pytest
import reference
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_as_accurate, wide
from torch import nn
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.nn import (
    LayerNorm,
    ParallelMLP,
    ParallelSelfAttention,
    ParallelTransformerBlock,
    RMSNorm,
    RowParallelLinear,
)
from tpkernels.sharding.spec import ShardSpec

EXACT = dict(atol=0, rtol=0)


def grads_of(function, inputs, dy=None):
    """function's outputs and the gradients of those inputs that are floating-point tensors."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    (out if dy is None else (out * dy)).sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


# ---- activations and norms --------------------------------------------------------------------------------------------------------

SHAPES = [(7, 33), (2, 3, 17), (33,), (0, 8), (5, 1)]


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_act(activation, biases, shape):
    torch.manual_seed(0)
    none = [] if biases else [None, None]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(*s).to(dtype) for s in (shape, shape, *[shape[-1:]] * 2 * biases)]
        dy = torch.randn(*shape).to(dtype)
        ours = grads_of(lambda g, u, *b: tpf.gated_act(g, u, activation, *b), inputs, dy)
        twins = [
            grads_of(
                lambda *a: reference.gated_act(*a, *none, activation),
                [t.to(d) for t in inputs],
                dy.to(d),
            )
            for d in (dtype, wide(dtype))
        ]
        for name, *values in zip(
            ("y", "dgate", "dup", "dgate_bias", "dup_bias"), ours, *twins, strict=False
        ):
            assert_as_accurate(name, *values)


def test_gated_act_computes_the_gradients_asked_for():
    gate, up, bias = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(4)
    tpf.gated_act(gate, up, "swiglu", bias, bias.clone().requires_grad_()).sum().backward()
    want = gate.grad.clone()
    gate.grad = None
    reference.gated_act(gate, up, bias, bias, "swiglu").sum().backward()
    assert_close(want, gate.grad)


def test_bias_act_promotes_as_addition_does():
    x, bias, dy = (
        torch.randn(5, 6).bfloat16().requires_grad_(),
        torch.randn(6, requires_grad=True),
        torch.randn(5, 6),
    )
    for activation in ("gelu", None):
        y = tpf.bias_act(x, bias, activation)
        assert y.dtype == torch.float32
        x.grad = bias.grad = None
        y.backward(dy)
        grads = x.grad, bias.grad
        x.grad = bias.grad = None
        want = reference.bias_act(x, bias, activation)
        want.backward(dy)
        assert_close([y, *grads], [want, x.grad, bias.grad])


@pytest.mark.parametrize(
    "activation", ["relu", "relu2", "gelu", "gelu_tanh", "silu", "swiglu", "geglu"]
)
def test_bias_act_and_its_biases_gradient(activation):
    torch.manual_seed(0)
    for shape, dtype in itertools.product(
        [(4, 34), (2, 3, 16), (0, 8), (6,)], (torch.float32, torch.bfloat16)
    ):
        inputs = [torch.randn(*shape).to(dtype), torch.randn(shape[-1]).to(dtype)]
        dy = torch.randn(
            *shape[:-1], shape[-1] // (2 if activation in ("swiglu", "geglu") else 1)
        ).to(dtype)
        ours = grads_of(lambda x, b: tpf.bias_act(x, b, activation), inputs, dy)
        twins = [
            grads_of(
                lambda x, b: reference.bias_act(x, b, activation),
                [t.to(d) for t in inputs],
                dy.to(d),
            )
            for d in (dtype, wide(dtype))
        ]
        for name, *values in zip(("y", "dx", "db"), ours, *twins, strict=True):
            assert_as_accurate(f"{name} {shape}", *values)


def stock_norm(x, weight, bias, residual, rms):
    h = x if residual is None else x + residual
    y = (
        F.rms_norm(h, h.shape[-1:], weight, 1e-5)
        if rms
        else F.layer_norm(h, h.shape[-1:], weight, bias, 1e-5)
    )
    return y if residual is None else (y, h)


@pytest.mark.parametrize("rms", [True, False], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    "with_residual,used", [(False, "both"), (True, "both"), (True, "norm"), (True, "sum")]
)
def test_norm(rms, with_residual, used):
    """Results and gradients, also where one of the two results is not used."""
    torch.manual_seed(0)
    for shape, affine, dtype in itertools.product(
        [(7, 33), (2, 3, 17), (33,), (0, 8)], (False, True), (torch.float32, torch.bfloat16)
    ):
        x, residual = (
            torch.randn(*shape).to(dtype),
            torch.randn(*shape).to(dtype) if with_residual else None,
        )
        weight, bias = (
            torch.randn(shape[-1]).to(dtype) if there else None
            for there in (affine, affine and not rms)
        )
        dys = [torch.randn(*shape).to(dtype) for _ in range(2)]

        def run(function, d):
            leaves = [
                None if t is None else t.detach().to(d).requires_grad_()
                for t in (x, weight, bias, residual)  # noqa: B023
            ]
            out = function(*leaves)
            out = out if with_residual else (out,)
            kept = {"both": (0, 1), "norm": (0,), "sum": (1,)}[used][: len(out)]
            torch.autograd.backward([out[i] for i in kept], [dys[i].to(d) for i in kept])  # noqa: B023
            return [*out, *(t.grad for t in leaves if t is not None)]

        def ours(x, weight, bias, residual):
            args = (weight,) if rms else (weight, bias)
            return (tpf.rms_norm if rms else tpf.layer_norm)(x, *args, eps=1e-5, residual=residual)

        results = (
            run(ours, dtype),
            *(run(lambda *a: stock_norm(*a, rms), d) for d in (dtype, wide(dtype))),
        )
        for i, values in enumerate(zip(*results, strict=True)):
            none = [v is None or not v.any() for v in values]
            assert none[0] == none[2] or values[2].numel() < 2, (
                i,
                shape,
            )  # an unused result gives its weight no gradient
            if not none[2]:
                assert values[0].dtype == dtype
                assert_as_accurate(f"result {i} {shape}", *(v.detach() for v in values))


def test_norm_of_mixed_dtypes():
    x, residual, weight = (
        torch.randn(3, 8).bfloat16().requires_grad_(),
        torch.randn(3, 8),
        torch.randn(8, requires_grad=True),
    )
    y, total = tpf.rms_norm(x, weight, residual=residual)
    assert y.dtype == total.dtype == torch.float32
    assert_close([y, total], list(stock_norm(x.float(), weight, None, residual, True)))
    y.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    assert tpf.rms_norm(x, weight).dtype == torch.bfloat16


def test_norm_modules():
    x, residual = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    for ours, stock in (
        (RMSNorm(12), nn.RMSNorm(12)),
        (RMSNorm(12, 0.1, elementwise_affine=False), nn.RMSNorm(12, 0.1, elementwise_affine=False)),
        (LayerNorm(12), nn.LayerNorm(12)),
        (LayerNorm(12, 0.1, bias=False), nn.LayerNorm(12, 0.1, bias=False)),
        (LayerNorm(12, elementwise_affine=False), nn.LayerNorm(12, elementwise_affine=False)),
    ):
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.copy_(torch.randn(12))
        ours.load_state_dict(stock.state_dict())
        assert_close(ours(x), stock(x))
        y, total = ours(x, residual)
        assert_close([y, total], [stock(x + residual), x + residual])
    with pytest.raises(ValueError, match="normalized_shape must be an int"):
        RMSNorm((3, 4))


# ---- rotary embedding ---------------------------------------------------------------------------------------------------------------


def turned(x, cos, sin, interleaved):
    """Pair by pair, as complex numbers times e^(i angle)."""
    half = cos.shape[-1]
    tables = torch.complex(*(t.to(torch.float64) for t in (cos, sin)))
    tables = tables if tables.dim() == 2 else tables[:, None]
    head = x[..., : 2 * half].to(torch.float64)
    pairs = (
        head.unflatten(-1, (half, 2))
        if interleaved
        else head.unflatten(-1, (2, half)).transpose(-1, -2)
    )
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * tables)
    product = product if interleaved else product.transpose(-1, -2)
    return torch.cat([product.flatten(-2), x[..., 2 * half :].to(torch.float64)], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_rotary(interleaved, batched):
    torch.manual_seed(0)
    cos, sin = tpf.rotary_tables(7, 6)
    tables = (
        [t.expand(2, 7, 3) * torch.tensor([1.0, -1.0])[:, None, None] for t in (cos, sin)]
        if batched
        else [cos, sin]
    )
    for head_dim, dtype in itertools.product((6, 8), (torch.float32, torch.bfloat16)):
        x, dy = (
            torch.randn(2, 7, 3, head_dim).to(dtype).transpose(1, 2) for _ in range(2)
        )  # as projections give it
        ours = grads_of(lambda x: tpf.rotary(x, *tables, interleaved=interleaved), [x], dy)
        truth = grads_of(lambda x: turned(x, *tables, interleaved), [x.double()], dy.double())
        twin = grads_of(
            lambda x: reference.rotary(x, *(t.to(x.dtype) for t in tables), interleaved, False),
            [x],
            dy,
        )
        for name, *values in zip(("y", "dx"), ours, twin, truth, strict=True):
            assert values[0].dtype == dtype
            assert_as_accurate(name, *values)
    x = torch.randn(2, 3, 7, 6, requires_grad=True)
    tpf.rotary(x, cos, sin).sum().backward()  # a gradient without strides
    assert_close(x.grad.double(), grads_of(lambda x: turned(x, cos, sin, False), [x.double()])[1])


def test_rotary_is_llamas():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    cos, sin = tpf.rotary_tables(9, 8, theta=500000.0)
    want = apply_rotary_pos_emb(q, k, *(torch.cat([t, t], -1)[None] for t in (cos, sin)))
    assert_close([tpf.rotary(t, cos, sin) for t in (q, k)], list(want))
    angle = torch.tensor(5.0) * 500000.0 ** (-2 / 8)
    assert_close(torch.stack([cos[5, 1], sin[5, 1]]), torch.stack([angle.cos(), angle.sin()]))


def rotated_attention():
    group, alone = (
        dist.group.WORLD,
        [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()],
    )
    cos, sin = tpf.rotary_tables(7, 4)
    for kv_heads in (9, 3, 1):
        layers = []
        for g in (group, alone):
            torch.manual_seed(1)
            layers.append(ParallelSelfAttention(18, 9, kv_heads, head_dim=4, group=g))
        split, whole = layers
        x, dy = torch.randn(2, 7, 18), torch.randn(2, 7, 18)
        leaves = [x.clone().requires_grad_() for _ in layers]
        outs = [layer(leaf, rotary=(cos, sin)) for layer, leaf in zip(layers, leaves, strict=True)]
        for out in outs:
            out.backward(dy)
        near = dict(atol=2e-5, rtol=2e-5)
        assert_close(*outs, **near)
        assert_close(*(leaf.grad for leaf in leaves), **near)
        assert_close(
            dict(tpk.unsharded_gradients(split)),
            {name: p.grad for name, p in whole.named_parameters()},
            atol=1e-4,
            rtol=1e-4,
        )
        p = {name: t.detach() for name, t in whole.state_dict().items()}
        q, k, v = (
            F.linear(x, p[f"{n}_proj.weight"], p[f"{n}_proj.bias"])
            .unflatten(-1, (-1, 4))
            .transpose(1, 2)
            for n in "qkv"
        )
        q, k = (turned(t, cos, sin, False).float() for t in (q, k))
        y = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        )
        assert_close(outs[0].detach(), F.linear(y, p["o_proj.weight"], p["o_proj.bias"]), **near)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_attention_with_rotary_embedding(pool, ranks):
    pool.run(ranks, rotated_attention)


# ---- a row-parallel layer and the norm after it ---------------------------------------------------------------------------------------


def row_linear_and_norm():
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    split, (w, b, scale) = (
        ShardSpec.chunks(18, world, dim=-1),
        (torch.randn(23, 18), torch.randn(23), torch.randn(23)),
    )
    for shape, overlap, bias, with_residual in itertools.product(
        ((2, 35), (), (0,)), (False, 3), (None, b), (False, True)
    ):
        x, residual = torch.randn(*shape, 18), torch.randn(*shape, 23) if with_residual else None
        args = dict(group=group, residual=residual, overlap=overlap)
        inputs = split.shard(x, rank), split.shard(w, rank), bias
        y = tpf.row_parallel_linear(*inputs, **args)
        seen = []
        for grad in (False, True):
            with torch.set_grad_enabled(grad), tpk.log_collectives() as log:
                normed, total = tpf.row_parallel_linear(
                    *inputs, norm=(scale.requires_grad_(grad), 1e-3), **args
                )
            assert_close(total, y, **EXACT)
            assert_close(normed, tpf.rms_norm(y, scale, 1e-3), **EXACT)
            assert normed.requires_grad == grad
            seen.append(log)
        assert seen[0] == seen[1] and (not x.numel() or world == 1 or seen[0])
    bare = RowParallelLinear(18, 23, group=group, input_is_parallel=False)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            normed, total = bare(
                x := torch.randn(4, 18), norm=RMSNorm(23, elementwise_affine=False)
            )
            assert_close(normed, F.rms_norm(bare(x), (23,)))
    with pytest.raises(ValueError, match=r"norm's weight has shape \(22,\)"):
        tpf.row_parallel_linear(*inputs, norm=(scale[1:], 1e-3), group=group)
    leaf, residual = (
        split.shard(x := torch.randn(4, 18), rank).clone().requires_grad_(),
        torch.randn(4, 23, dtype=torch.float64),
    )
    normed, total = tpf.row_parallel_linear(
        leaf, split.shard(w, rank), b, group=group, residual=residual, norm=(scale, 1e-3)
    )
    with torch.no_grad():
        again = tpf.row_parallel_linear(
            leaf, split.shard(w, rank), b, group=group, residual=residual, norm=(scale, 1e-3)
        )
    assert normed.dtype == total.dtype == torch.float64  # promotes, as + does
    assert_close(list(again), [normed.detach(), total.detach()], **EXACT)
    normed.sum().backward()
    theirs = x.double().requires_grad_()
    F.rms_norm(
        F.linear(theirs, w.double(), b.double()) + residual, (23,), scale.double(), 1e-3
    ).sum().backward()
    assert_close(leaf.grad.double(), split.shard(theirs.grad, rank), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_row_linear_with_the_norm_after_it(pool, ranks):
    pool.run(ranks, row_linear_and_norm)


def blocks_without_gradients():
    for norm in ("rmsnorm", "layernorm"):
        block = ParallelTransformerBlock(
            18, 9, 27, 3, norm=norm, activation="swiglu", group=dist.group.WORLD
        )
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                if "norm" in name:
                    parameter.copy_(torch.rand(18))
        x = torch.randn(2, 5, 18)
        out = block(x, rotary=tpf.rotary_tables(5, 2))
        with (
            torch.no_grad(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            again = block(x, rotary=tpf.rotary_tables(5, 2))
        assert_close(again, out.detach(), **EXACT)
        ops = {event.key for event in profile.key_averages()}
        assert ("tpkernels::row_linear_rms_norm" in ops) == (norm == "rmsnorm")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_block_without_gradients(pool, ranks):
    pool.run(ranks, blocks_without_gradients)


# ---- what is refused, and torch.compile -----------------------------------------------------------------------------------------------

X, N4, N3 = torch.zeros(2, 4), torch.zeros(4), torch.zeros(3)
TABLES = torch.zeros(5, 2), torch.zeros(5, 2)
HEADS = torch.zeros(1, 2, 5, 4)
REFUSED = {
    "bias_act of integers": (lambda: tpf.bias_act(X.long(), None, "gelu"), TypeError, "int64"),
    "bias_act with a scalar": (
        lambda: tpf.bias_act(X[0, 0], None, "gelu"),
        ValueError,
        "at least one dimension",
    ),
    "bias_act with another bias": (
        lambda: tpf.bias_act(X, N3, "gelu"),
        ValueError,
        r"bias has shape \(3,\)",
    ),
    "bias_act of an unknown kind": (lambda: tpf.bias_act(X, None, "tanh"), ValueError, "'tanh'"),
    "bias_act of odd halves": (
        lambda: tpf.bias_act(X[:, :3], None, "swiglu"),
        ValueError,
        "3 features",
    ),
    "gated_act, not gated": (lambda: tpf.gated_act(X, X, "gelu"), ValueError, "swiglu, geglu"),
    "gated_act of integers": (lambda: tpf.gated_act(X, X.long(), "geglu"), TypeError, "int64"),
    "gated_act of two shapes": (lambda: tpf.gated_act(X, X[:1], "geglu"), ValueError, "one shape"),
    "gated_act with one bias": (
        lambda: tpf.gated_act(X, X, "geglu", N4),
        ValueError,
        "both or neither",
    ),
    "gated_act with another bias": (
        lambda: tpf.gated_act(X, X, "geglu", N4, N3),
        ValueError,
        "up_bias",
    ),
    "rms_norm of integers": (lambda: tpf.rms_norm(X.long()), TypeError, "int64"),
    "rms_norm of a scalar": (lambda: tpf.rms_norm(X[0, 0]), ValueError, "at least one dimension"),
    "rms_norm with another weight": (
        lambda: tpf.rms_norm(X, N3),
        ValueError,
        r"weight has shape \(3,\)",
    ),
    "layer_norm with another bias": (
        lambda: tpf.layer_norm(X, N4, N3),
        ValueError,
        r"bias has shape \(3,\)",
    ),
    "layer_norm with another residual": (
        lambda: tpf.layer_norm(X, residual=X[:1]),
        ValueError,
        "residual",
    ),
    "dropout of integers": (lambda: tpf.dropout(X.long()), TypeError, "int64"),
    "dropout of a scalar": (lambda: tpf.dropout(X[0, 0]), ValueError, "at least one dimension"),
    "dropout of too much": (lambda: tpf.dropout(X, 1.5), ValueError, r"\[0, 1\], got 1.5"),
    "dropout of nan": (lambda: tpf.dropout(X, float("nan")), ValueError, "nan"),
    "dropout before the first row": (lambda: tpf.dropout(X, row=-1), ValueError, "-1"),
    "dropout with a float seed": (lambda: tpf.dropout(X, seed=torch.ones(1)), ValueError, "seed"),
    "dropout with two seeds": (
        lambda: tpf.dropout(X, seed=torch.tensor([1, 2])),
        ValueError,
        "seed",
    ),
    "rotary of integers": (lambda: tpf.rotary(HEADS.long(), *TABLES), TypeError, "int64"),
    "rotary of three dimensions": (lambda: tpf.rotary(HEADS[0], *TABLES), ValueError, "head_dim"),
    "rotary with other tokens": (
        lambda: tpf.rotary(HEADS[:, :, :4], *TABLES),
        ValueError,
        "cos and sin must be",
    ),
    "rotary of too many features": (
        lambda: tpf.rotary(HEADS[..., :3], *TABLES),
        ValueError,
        "head_dim 3",
    ),
    "rotary tables that learn": (
        lambda: tpf.rotary(HEADS, TABLES[0].clone().requires_grad_(), TABLES[1]),
        ValueError,
        "no gradient",
    ),
    "tables of odd features": (lambda: tpf.rotary_tables(5, 3), ValueError, "even"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


def compiled_layers():
    weight, bias = torch.randn(16, requires_grad=True), torch.randn(16, requires_grad=True)
    mlp = ParallelMLP(16, 24, activation="gelu", group=dist.group.WORLD)
    tables, seed = tpf.rotary_tables(3, 4), torch.tensor([4])
    for name, function in {
        "bias_act": lambda x: tpf.bias_act(x, bias, "gelu"),
        "gated_act": lambda x: tpf.gated_act(x, x * 2, "swiglu"),
        "rms_norm": lambda x: tpf.rms_norm(x, weight, residual=x * 2)[0],
        "layer_norm": lambda x: tpf.layer_norm(x, weight, bias),
        "dropout": lambda x: tpf.dropout(x, 0.5, seed),
        "rotary": lambda x: tpf.rotary(x.view(1, 2, 3, 16), *tables),
        "mlp": mlp,
    }.items():
        x = torch.randn(6, 16)
        assert_close(
            grads_of(torch.compile(function, fullgraph=True, backend="aot_eager"), [x]),
            grads_of(function, [x]),
            msg=name,
        )


def test_torch_compile_takes_them_whole(pool):
    pool.run(1, compiled_layers)
