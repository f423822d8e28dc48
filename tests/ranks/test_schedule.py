"""Schedules that ranks take together: rank 0 decides for all."""

import pytest
import torch
import torch.distributed as dist
from pool import run_on_ranks
from schedules import timings
from torch import nn
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels import group as groups
from tpkernels.group import Group, resolve_group
from tpkernels.ops.linear import ReduceOptions, chunks_and_channel
from tpkernels.overlap.calibration_cache import Calibration, calibration_of, install
from tpkernels.overlap.cost_model import CHUNK_COUNTS
from tpkernels.overlap.schedule import choose
from tpkernels.sharding.spec import ShardSpec


def run_uneven_layers(group):
    """Return the (tag, chunks) of each collective and the layers' explanations.

    The ranks' shards differ, 3 and 2 features or 2, 2 and 1, and the choice is still one.
    """
    x, stock, back = torch.randint(-3, 4, (4096, 5)).float(), nn.Linear(5, 6), nn.Linear(6, 5)
    with torch.no_grad():
        for p in (*stock.parameters(), *back.parameters()):
            p.copy_(torch.randint(-3, 4, p.shape))
    row = tpk.nn.RowParallelLinear.from_linear(stock, group=group)
    column = tpk.nn.ColumnParallelLinear.from_linear(back, group=group)
    mine = ShardSpec.chunks(5, group.size, -1).shard(x, group.rank)
    y = torch.zeros(4096, 6, requires_grad=True)
    with tpk.log_collectives() as log:
        assert_close(row(mine), stock(x), atol=0, rtol=0)
        column(y).sum().backward()
        # A functional call does not know the shard sizes.
        tpf.row_parallel_linear(mine, row.weight_and_bias()[0], group=group)
    assert_close(y.grad, back.weight.sum(0).expand(4096, 6), atol=0, rtol=0)
    chunks = [(c.tag, c.chunks) for c in log if c.chunk == 0]
    return chunks, (row.explain(4096), column.explain(4096))


def shared(rank_table):
    """Each rank offers a table of its own."""
    rank, group = dist.get_rank(), resolve_group(dist.group.WORLD)
    assert "tpk.tune(group) has not been run" in tpk.nn.RowParallelLinear(
        8, 8, group=group
    ).explain(4096)
    table = install(Calibration("here", "today", {torch.float32: rank_table[rank]}), group)
    picks = [
        choose("auto", rows, 4 * n, group, k, torch.float32, w)
        for rows in (0, 64, 300, 4096)
        for n in (8, 64)
        for k in (1, 9)
        for w in (0, 1)
    ]
    layer_call = torch.empty(4096, 9), 8, ReduceOptions(group, 9, "auto", "test")
    chosen = chunks_and_channel(*layer_call)
    assert chosen is chunks_and_channel(*layer_call)  # looked up
    assert chosen[0] == choose("auto", 4096, 32, group, 9, torch.float32).chunks
    # Ranks whose shards may differ have nothing to agree on.
    assert choose("auto", 4096, 32, group, None, torch.float32).chunks == 1
    # This dtype was not measured.
    assert (
        choose("auto", 4096, 32, group, 9, torch.float16).reason
        == choose("auto", 4096, 32, group).reason
    )
    assert (
        choose(False, 4096, 32, group, 9, torch.float32).chunks == 1
        and choose(7, 4096, 32, group, 9, torch.float32).chunks == 7
    )

    chunks, explained = run_uneven_layers(group)
    install(None, group)
    assert calibration_of(group) is None
    return table.timings, picks, chunks, explained


@pytest.mark.parametrize("ranks", [2, 3])
def test_rank_0_decides_for_all(pool, ranks):
    slow, fast = timings(1e-6, 1e-6, latency=1e-5), timings(1e-6, 1e-12)
    for mine in ([slow, fast, fast], [fast, slow, slow]):
        results = pool.run(ranks, shared, mine)
        assert all(result[:3] == results[0][:3] for result in results)
        dtypes, picks, chunks, (row, column) = results[0]
        assert dtypes == {torch.float32: mine[0]}
        assert any(pick.chunks > 1 for pick in picks) == (mine[0] is slow)
        assert [tag for tag, _ in chunks] == ["row_forward", "column_backward", "row_forward"]
        assert [n > 1 for _, n in chunks] == [mine[0] is slow, mine[0] is slow, False]
        for text, (_, n) in zip((row, column), chunks, strict=False):
            lines = text.splitlines()
            start = next(
                i
                for i, line in enumerate(lines)
                if line.startswith("chunks  predicted ms  measured ms")
            )
            last = lines.index("measured: today, on here")
            listed = [line.split() for line in lines[start + 1 : last]]
            assert [int(line[0]) for line in listed] == list(CHUNK_COUNTS) and [
                line[0] for line in listed if line[-1] == "<"
            ] == [str(n)]
            assert "over gloo" in text and "predicted" in text and lines[-1].startswith("gemm of")


@run_on_ranks(2)
def test_torch_compile_takes_a_tuned_layer_whole():
    """A tuned layer in one graph, at more sizes than one."""
    group = resolve_group(dist.group.WORLD)
    install(Calibration("here", "today", {torch.float32: timings(1e-6, 1e-6)}), group)
    row = tpk.nn.RowParallelLinear(16, 8, group=group)
    function = torch.compile(row, backend="aot_eager", fullgraph=True)
    for rows in (512, 64, 1024, 700):
        x = torch.randn(rows, 8)
        with tpk.log_collectives() as log:
            y = function(x)
        assert_close(y, row(x))
        assert log[0].chunks == choose("auto", rows, 32, group, 8, torch.float32).chunks
    install(None, group)


@run_on_ranks(2)
def test_groups_of_other_devices_or_channels_choose_for_themselves():
    pg, chunked = dist.group.WORLD, dist.new_group()
    plain = Group(pg, "cpu")
    assert plain.schedules is Group(pg, "cpu").schedules
    assert plain.schedules is not Group(pg, "cuda").schedules
    groups.register_chunked_group(pg, chunked)
    try:
        assert plain.schedules is not Group(pg, "cpu").schedules
    finally:
        groups._chunked_groups.clear()
