"""Tests of layers and losses on several ranks whose ops run the Triton kernels."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.kernels import registration
from tpkernels.nn import ParallelMLP, ParallelTransformerBlock
from tpkernels.sharding.spec import ShardSpec

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/gpu runs these ops where they are registered anyway"
)


def run_layers():
    """Results and gathered gradients, replicated ones as they are on this rank."""
    torch.manual_seed(1)
    group, world, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x = torch.randn(2, 5, 24, requires_grad=True)
    found = {}
    for name, layer in {
        "mlp": ParallelMLP(24, 30, activation="gelu_tanh", group=group),
        "gated mlp": ParallelMLP(24, 31, activation="swiglu", group=group),
        "block": ParallelTransformerBlock(
            24, 4, 50, 2, norm="rmsnorm", activation="swiglu", dropout=0.3, group=group
        ),
        "old block": ParallelTransformerBlock(24, 4, 50, activation="relu2", group=group),
    }.items():
        tables = tpf.rotary_tables(5, 6)
        out = layer(x, **({"rotary": tables} if "block" in name else {}))
        out.square().sum().backward()
        found |= {f"{name} {key}": value for key, value in tpk.unsharded_gradients(layer).items()}
        found[f"{name} out"], found[f"{name} x"], x.grad = out.detach(), x.grad, None
    spec, target = ShardSpec.chunks(37, world), torch.randint(37, (2, 5))
    weight = torch.randn(37, 24)
    mine = spec.shard(weight, rank).clone().requires_grad_()
    options = dict(group=group, num_classes=37, label_smoothing=0.1)
    for name, loss in {
        "loss": lambda: tpf.vocab_parallel_cross_entropy(F.linear(x, mine), target, **options),
        "fused loss": lambda: tpf.vocab_parallel_linear_cross_entropy(
            x, mine, target, chunk_rows=4, **options
        ),
    }.items():
        value = loss()
        value.backward()
        found[f"{name}"], found[f"{name} weight"], x.grad, mine.grad = (
            value.detach(),
            mine.grad,
            None,
            None,
        )
    return found


def by_triton_and_by_cpp():
    """The same twice: the second time the ops are Triton's."""
    plain, launches = run_layers(), set()
    for op_module in registration.OP_MODULES:
        module = __import__(f"tpkernels.kernels.{op_module}", fromlist=["OPS"])
        for name, launch in module.OPS.items():
            module.OPS[name] = lambda *args, name=name, launch=launch: (
                launches.add(name),
                launch(*args),
            )[1]
    registration.register("CPU")
    triton = run_layers()
    registration._libraries.clear()
    return plain, triton, launches


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_layers_on_ranks(pool, ranks):
    results = pool.run(ranks, by_triton_and_by_cpp)
    for plain, triton, launches in results:
        assert {
            "bias_act",
            "bias_act_backward",
            "norm",
            "norm_backward",
            "vocab_ce_stats",
            "vocab_ce_grad",
            "vocab_ce_grad_",
        } <= launches
        assert {"dropout", "rotary"} <= launches
        for name, want in plain.items():
            error = (triton[name] - want).abs().max() / want.abs().max().clamp_min(1e-3)
            assert error < 1e-5, f"{name}: {error:.1e}"
    for name, first in results[0][1].items():  # what is replicated has the same bits on every rank
        if name.endswith(("out", "loss")):
            assert all(torch.equal(other[1][name], first) for other in results), name


def tuned(folder):
    """Rank 0 times each configuration by a clock of its own; the others would choose otherwise."""
    import os

    os.environ["XDG_CACHE_HOME"] = folder
    from tpkernels.kernels import tuning
    from tpkernels.kernels.launch_config import Tunable

    clock = iter(range(10**6)) if dist.get_rank() == 0 else None
    pg = dist.distributed_c10d._get_default_group()
    table = tuning.tune(
        pg,
        features=(100,),
        dtypes=(torch.float32,),
        device="cpu",
        measure=lambda call: -next(clock),
    )
    now = {name: tunable(100, 4) for name, tunable in Tunable.known.items()}
    for tunable in Tunable.known.values():
        tunable.chosen.clear()
    loaded = tuning.load(pg, "cpu")
    again = {name: tunable(100, 4) for name, tunable in Tunable.known.items()}
    first = {name: tunable.candidates(128, 4)[0] for name, tunable in Tunable.known.items()}
    for tunable in Tunable.known.values():
        tunable.chosen.clear()
    assert table == loaded
    path = tuning.table_path(torch.device("cpu"))
    whole = path.read_text()
    dist.barrier()
    for text in (
        whole[:-9],
        '{"bias_act": 3}',
        '{"a kernel of old": {}}',
    ):  # half a file, another format, another version
        path.write_text(text)
        dist.barrier()
        assert tuning.load(pg, "cpu") == {}
        dist.barrier()
    path.write_text('{"bias_act": {"128,4": [{"ROWS": 8, "COLS": 64}, 4, 2]}}')  # old names
    dist.barrier()
    assert tuning.load(pg, "cpu") == {"bias_act": {}}
    dist.barrier()
    path.write_text(whole)
    return now, again, first


def test_rank_0_tunes_for_all(pool, tmp_path):
    results = pool.run(2, tuned, str(tmp_path))
    (now, again, first), (other_now, other_again, _) = results
    assert now == again == other_now == other_again
    # The last of several candidates had the best time.
    assert any(now[name] != first[name] for name in now)
    (file,) = (tmp_path / "tpkernels").iterdir()
    assert json.loads(file.read_text()).keys() == now.keys()


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    from tpkernels.kernels import tuning

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it before the capture"):
        tuning.tune(None, device="cuda")
