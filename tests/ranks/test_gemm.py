"""The GEMMs that CPUs take instead of at::mm: every one forced, and the cache of packed weights."""

import contextlib
import copy
import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_as_accurate, wide
from torch import nn
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels import _C

OPS = torch.ops.tpkernels
EXACT = dict(atol=0, rtol=0)
Library = _C.Library
# (library, wide, packed)
GEMMS = [
    (library, widened, packed)
    for library in (Library.aten, Library.mkl, Library.onednn)
    for widened in (False, True)
    for packed in (False, True)
    if _C.has_library(library)
    and packed >= (library == Library.mkl)
    and not (packed and library == Library.aten)
]
IDS = [f"{g[0].name}{'-wide' * g[1]}{'-packed' * g[2]}" for g in GEMMS]
PACKED = next((g for g in GEMMS if g == (Library.onednn, False, True)), None) or next(
    (g for g in GEMMS if g[2]), None
)
needs_packing = pytest.mark.skipif(
    PACKED is None, reason="this torch has neither MKL nor oneDNN: nothing is packed"
)


@contextlib.contextmanager
def forced(gemm):
    _C.force_gemm(gemm)
    try:
        yield
    finally:
        _C.force_gemm(None)


@pytest.fixture(autouse=True)
def choice_again():
    yield
    _C.force_gemm(None)


def can(gemm, dtype):
    """oneDNN takes half types as they are on some machines only."""
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    narrow_onednn = gemm[0] == Library.onednn and not gemm[1] and dtype in supported
    return not narrow_onednn or getattr(torch.ops.mkldnn, supported[dtype])()


def integers(*shape, dtype=torch.float32):
    """Every sum below is exact, in bfloat16 too."""
    return torch.randint(-1, 2, shape).to(dtype)


SHAPES = [
    (1, 300, 7),
    (5, 64, 96),
    (130, 33, 17),
    (0, 8, 8),
    (4, 0, 8),
    (4, 8, 0),
    (1, 1, 1),
    (3, 2, 1030),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("gemm", GEMMS, ids=IDS)
def test_every_gemm_is_exact_on_integers(gemm, dtype):
    if not can(gemm, dtype):
        pytest.skip("oneDNN has no arithmetic for this dtype on this machine")
    for rows, k, n in SHAPES:
        x, w, b, dy = (
            integers(*shape, dtype=dtype) for shape in ((rows, k), (n, k), (n,), (rows, n))
        )
        layouts = [
            (x, w),
            (
                integers(rows, 2 * k, dtype=dtype)[:, :k],
                w.t().contiguous().t(),
            ),  # strided rows, a transposed weight
            (
                integers(k, rows, dtype=dtype).t(),
                integers(n, 2 * k, dtype=dtype)[:, ::2][:, :k],
            ),  # nothing contiguous
        ]
        for x, w in layouts:
            for bias in (None, b):
                want = F.linear(x.double(), w.double(), None if bias is None else bias.double()).to(
                    dtype
                )
                with forced(gemm):
                    for _ in range(3):  # unpacked, packed, from the cache
                        assert_close(OPS.linear(x, w, bias, False), want, **EXACT)
                    assert_close(OPS.linear(x[None], w, bias, True), want[None], **EXACT)
                    if rows:
                        assert_close(OPS.linear(x[0], w, bias, False), want[0], **EXACT)
            with forced(gemm):
                dx, dw, db = OPS.row_linear_backward(dy, x, w, True)
            for ours, truth in (
                (dx, dy.double() @ w.double()),
                (dw, dy.double().t() @ x.double()),
                (db, dy.double().sum(0)),
            ):
                assert_close(ours, truth.to(dtype), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gemm", GEMMS, ids=IDS)
def test_every_gemm_is_as_accurate_as_torch(gemm, dtype):
    if not can(gemm, dtype):
        pytest.skip("oneDNN has no arithmetic for this dtype on this machine")
    rows, k, n = 150, 192, 320
    x, w, b, dy = (
        torch.randn(*shape, dtype=dtype) for shape in ((rows, k), (n, k), (n,), (rows, n))
    )
    big = wide(dtype)
    with forced(gemm):
        for _ in range(2):
            ours = OPS.linear(x, w, b, False)
        grads = OPS.row_linear_backward(dy, x, w, False)
    assert_as_accurate("y", ours, F.linear(x, w, b), F.linear(x.to(big), w.to(big), b.to(big)))
    assert_as_accurate("dx", grads[0], dy @ w, dy.to(big) @ w.to(big))
    assert_as_accurate("dw", grads[1], dy.t() @ x, dy.to(big).t() @ x.to(big))


@pytest.mark.skipif(not _C.has_library(Library.onednn), reason="this torch has no oneDNN")
def test_onednn_sums_float32_in_blocks_where_a_gradient_is_wanted():
    rows, k, n = 700, 1030, 2100  # more than one block of rows and of k, the last of each ragged
    x, w, b, dy = integers(rows, k), integers(n, k), integers(n), integers(rows, n)
    layouts = [
        (x, w),
        (x.t().contiguous().t(), w.t().contiguous().t()),
        (integers(rows, 2 * k)[:, ::2], integers(2 * n, k)[::2]),
    ]
    with forced((Library.onednn, False, False)):
        for x, w in layouts:
            for some in (x, x[:7]):  # few rows are left to at::mm
                assert_close(OPS.linear(some, w, b, True), F.linear(some, w, b), **EXACT)
            dx, dw = OPS.row_linear_backward(dy, x, w, False)
            assert_close(dx, dy @ w, **EXACT)
            assert_close(dw, dy.t() @ x, **EXACT)
        x, w, dy = (
            torch.rand(256, 4096),
            torch.rand(256, 4096),
            torch.rand(4096, 256),
        )  # one sign: errors grow with the sum
        y, dw = (
            OPS.linear(x, w, None, True),
            OPS.row_linear_backward(dy, w.t().contiguous(), None, False)[0],
        )
        at_once = OPS.linear(x, w, None, False)
    truth = F.linear(x.double(), w.double())
    assert_as_accurate("y", y, F.linear(x, w), truth)
    assert_as_accurate("dw", dw, dy.t() @ w.t(), dy.double().t() @ w.double().t())
    assert (y - truth).abs().max() < 0.7 * (at_once - truth).abs().max()


@pytest.mark.parametrize("gemm", GEMMS, ids=IDS)
def test_what_is_not_finite_comes_through(gemm):
    x, w = torch.ones(3, 32), torch.ones(16, 32)
    x[0, 5], x[1, 6], w[7, 3] = torch.nan, torch.inf, -torch.inf
    with forced(gemm):
        for _ in range(3):
            assert_close(OPS.linear(x, w, None, False), F.linear(x, w), equal_nan=True, **EXACT)


def layers(gemm, dtype):
    """Parallel layers, siblings and the fused loss by a forced GEMM, exactly."""
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    torch.manual_seed(3)
    x, w, dy = (
        integers(40, 6 * world, dtype=dtype),
        integers(16, 6 * world, dtype=dtype),
        integers(40, 16, dtype=dtype),
    )
    mine = [t.chunk(world, 1)[rank].clone().requires_grad_() for t in (x, w)]
    with forced(gemm):
        for chunks in (1, 3):
            for t in mine:
                t.grad = None
            y = tpf.row_parallel_linear(*mine, group=group, overlap=chunks)
            assert_close(y, F.linear(x, w), **EXACT)
            y.backward(dy)
            assert_close(mine[0].grad, (dy @ w).chunk(world, 1)[rank], **EXACT)
            assert_close(mine[1].grad, (dy.t() @ x).chunk(world, 1)[rank], **EXACT)
            with torch.no_grad():
                for _ in range(3):
                    assert_close(
                        tpf.row_parallel_linear(*mine, group=group, overlap=chunks),
                        F.linear(x, w),
                        **EXACT,
                    )
        weights, dys = (
            [integers(n, 12, dtype=dtype) for n in (4, 8)],
            [integers(40, n, dtype=dtype) for n in (4, 8)],
        )
        inner = integers(40, 12, dtype=dtype)
        dx, *dws = OPS.column_linear_backward(
            dys, inner, weights, True, [True] * 2, [False] * 2, group.group_name, 3, "column"
        )
        total = sum(dy.float() @ w.float() for dy, w in zip(dys, weights, strict=True))
        assert_close(dx, (world * total).to(dtype), **EXACT)
        for dy, dw in zip(dys, dws, strict=True):
            assert_close(dw, dy.t() @ inner, **EXACT)
        tall, target = torch.randn(10, 8, requires_grad=True), torch.randint(0, 3 * world, (10,))
        dist.broadcast(tall.data, 0), dist.broadcast(target, 0)
        table = torch.randn(3 * world, 8)
        dist.broadcast(table, 0)
        part = table.chunk(world)[rank].clone().requires_grad_()
        tpf.vocab_parallel_linear_cross_entropy(
            tall, part, target, group=group, num_classes=3 * world
        ).backward()
        ours = tall.grad, part.grad
    whole, tall = table.requires_grad_(), tall.detach().requires_grad_()
    F.cross_entropy(tall @ whole.t(), target).backward()
    assert_close(ours[0], tall.grad)
    assert_close(ours[1], whole.grad.chunk(world)[rank])


@pytest.mark.parametrize("gemm", GEMMS, ids=IDS)
def test_layers_and_loss_take_them(pool, gemm):
    for dtype in (torch.float32, torch.bfloat16):
        if can(gemm, dtype):
            pool.run(2, layers, gemm, dtype)


def settled(w, x):
    """After this the weight's packed copy is in use."""
    for _ in range(3):
        OPS.linear(x, w, None, False)
    assert _C.packed_bytes(w)


EDITS = {
    "add_": lambda w: w.add_(1),
    "an element": lambda w: w[1, 3].add_(1),
    "data.mul_": lambda w: w.data.mul_(2),
    "data.copy_": lambda w: w.data.copy_(torch.ones_like(w)),
    "data: the first row": lambda w: w.data[0].add_(1),
    "data: the last row": lambda w: w.data[-1].add_(1),
    "data: two rows swapped": lambda w: w.data.__setitem__(slice(0, 2), w.data[:2].flip(0).clone()),
    "data: the first column": lambda w: w.data[:, 0].add_(1),
    "data: the last column": lambda w: w.data[:, -1].add_(1),
    "data: a column inside": lambda w: w.data[:, w.shape[1] // 2].add_(1),
    "numpy": lambda w: (
        w.detach().float().numpy().__imul__(2) if w.dtype == torch.float32 else w.data.mul_(2)
    ),
    "set_": lambda w: w.data.set_(torch.ones_like(w)),
    "data =": lambda w: setattr(w, "data", torch.ones_like(w)),
}


@needs_packing
@pytest.mark.parametrize("shape", [(64, 200), (3, 1000), (500, 5)], ids=str)
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("edit", EDITS)
def test_edits_are_seen(edit, inference, shape):
    if edit == "an element" and inference:
        pytest.skip(
            "an inference tensor has no version: one element's edit shows only where it is sampled"
        )
    with torch.inference_mode(inference), forced(PACKED):
        w, x = integers(*shape), integers(4, shape[1])
        settled(w, x)
        for _ in range(2):
            EDITS[edit](w)
            for _ in range(3):
                assert_close(OPS.linear(x, w, None, False), F.linear(x, w), **EXACT)


@needs_packing
def test_a_weight_that_always_changes_is_never_packed():
    with forced(PACKED):
        w, x = integers(64, 64), integers(4, 64)
        for _ in range(5):
            w.add_(1)
            assert_close(OPS.linear(x, w, None, False), F.linear(x, w))
            assert not _C.packed_bytes(w)


@needs_packing
def test_memory_goes_back():
    before = _C.packed_bytes()
    with forced(PACKED):
        x, weights = integers(4, 64), [integers(64, 64) for _ in range(3)]
        for w in weights:
            settled(w, x)
        assert _C.packed_bytes() == before + sum(_C.packed_bytes(w) for w in weights)
        OPS.linear(x, weights[0], None, True)  # training begins
        assert not _C.packed_bytes(weights[0])
        del w, weights
        assert _C.packed_bytes() == before
        for _ in range(20):  # addresses come back, with other content
            w = integers(64, 64)
            for _ in range(3):
                assert_close(OPS.linear(x, w, None, False), F.linear(x, w), **EXACT)


@needs_packing
def test_views_have_entries_of_their_own():
    with forced(PACKED):
        whole, x = integers(128, 64), integers(4, 64)
        views = [whole, whole[:64], whole[64:], whole[:64].t(), whole[::2]]
        for _ in range(3):
            for w in views:
                assert_close(OPS.linear(x, w, None, False), F.linear(x, w), **EXACT)
        assert_close(OPS.linear(x, whole[:64], None, False), F.linear(x, whole[:64]))
        settled(whole[64:], x)


@needs_packing
def test_threads():
    errors = []

    def work(weights, x):
        try:
            for i in range(60):
                w = weights[i % len(weights)]
                assert_close(OPS.linear(x, w, None, False), F.linear(x, w), **EXACT)
                fresh = integers(32, 64)
                for _ in range(2):
                    assert_close(OPS.linear(x, fresh, None, False), F.linear(x, fresh))
                if i % 7 == 0:
                    OPS.linear(x, w, None, True)
        except BaseException as error:
            errors.append(error)

    with forced(PACKED):
        weights, x = [integers(64, 64) for _ in range(3)], integers(4, 64)
        threads = [threading.Thread(target=work, args=(weights, x)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def models(dtensor):
    """A model whose weights are packed, and everything that changes them; against the stock model, which nobody packs."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    x = torch.randn(8, 32)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj, self.down_proj = copy.deepcopy(stock[0]), copy.deepcopy(stock[2])

        def forward(self, x):
            return self.down_proj(F.gelu(self.up_proj(x)))

    split = tpk.parallelize(
        Model(),
        dist.group.WORLD,
        plan={"up_proj": "colwise", "down_proj": "rowwise"},
        dtensor=dtensor,
    )

    def local(model, name):
        weight = getattr(model, name).weight
        return weight.to_local() if hasattr(weight, "to_local") else weight

    def same(model=split, reference=stock):
        with torch.no_grad():
            for _ in range(3):
                assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)
        for name in ("up_proj", "down_proj"):
            assert _C.packed_bytes(local(model, name)), name
        with torch.inference_mode():
            assert_close(model(x), reference(x), atol=1e-5, rtol=1e-5)

    with forced(PACKED):
        same()
        assert "packed weights" in split.up_proj.explain(
            8
        ) and "bytes are held now" in split.down_proj.explain(8)
        optimizers = [
            torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
            for model in (split, stock)
        ]
        for _ in range(2):
            for model, optimizer in zip((split, stock), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                assert model is stock or not _C.packed_bytes(local(split, "down_proj"))
                optimizer.step()
            same()
        copied = copy.deepcopy(split)
        same(copied)
        with torch.no_grad():
            for p in stock.parameters():
                p.mul_(1.5)
        names = {"0": "up_proj", "2": "down_proj"}
        state = {f"{names[key[0]]}{key[1:]}": t for key, t in stock.state_dict().items()}
        tpk.load_unsharded_state_dict(split, state)
        same()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                assert_close(split(x).float(), stock(x).float(), atol=0.1, rtol=0.1)


@needs_packing
@pytest.mark.parametrize("dtensor", [False, True])
def test_models(pool, dtensor):
    pool.run(2, models, dtensor)


def layer_calls():
    """The short way and the long way of a layer agree, and errors stay errors."""
    stock = nn.Linear(48, 64)
    column, row = (
        cls.from_linear(stock, group=dist.group.WORLD)
        for cls in (tpk.nn.ColumnParallelLinear, tpk.nn.RowParallelLinear)
    )
    for layer in (column, row):
        for x in (
            torch.randn(5, 48),
            torch.randn(48),
            torch.randn(2, 3, 48),
            torch.randn(0, 48),
            torch.randn(48, 4).t(),
        ):
            with torch.no_grad():
                short = layer(x)
            assert_close(short, stock(x))
            long = layer(x)
            assert long.requires_grad and not short.requires_grad
            assert_close(short, long)
        with torch.no_grad():
            for bad, error in (
                (torch.randn(2, 47), ValueError),
                (torch.ones(2, 48, dtype=torch.long), TypeError),
                (torch.randn(2, 48).double(), TypeError),
            ):
                with pytest.raises(error):
                    layer(bad)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(torch.randn(2, 48)).dtype == torch.bfloat16
            x = torch.randn(6, 2, 48)
            assert_close(torch.vmap(layer)(x), layer(x))
            assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), stock(x))


def test_a_layer_of_one_rank_equals_the_stock_layer(pool):
    pool.run(1, layer_calls)


def test_the_choice():
    """Whatever the machine: nothing is packed with a gradient, nothing is changed for small, empty or double weights."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.zeros(512, 1024, dtype=dtype)
        for rows in (1, 16, 128, 4096):
            assert not _C.choose_gemm(weight, rows, False)[2]
        plain = (Library.aten, False, False)
        others = [
            (torch.zeros(16, 16, dtype=dtype), 128),
            (weight, 0),
            (weight[:0], 128),
            (weight.double(), 128),
        ]
        assert all(_C.choose_gemm(w, rows, True) == plain for w, rows in others)
