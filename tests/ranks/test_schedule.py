"""Schedules from a cost model: the model against pipelines worked out by hand, the table, and what ranks make of it together."""

import dataclasses
import os
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import tpkernels as tpk
import tpkernels.functional as tpf
from tpkernels.group import resolve_group
from tpkernels.ops.linear import chunks_and_channel
from tpkernels.overlap import calibration_cache
from tpkernels.overlap.calibration_cache import Calibration, calibration_of, install
from tpkernels.overlap.cost_model import (
    CHUNK_COUNTS,
    MIN_ROWS,
    Curve,
    GemmShape,
    Timings,
    chunk_rows,
    pipeline_seconds,
)
from tpkernels.overlap.schedule import choose
from tpkernels.sharding.spec import ShardSpec

quiet = settings(deadline=None, database=None, derandomize=True)
seconds = st.floats(1e-6, 1e3)


def timings(row=1e-3, byte=1e-6, contention=0.0, measured=None, latency=0.0):
    """GEMMs of `row` seconds a row at [1, 1], all_reduces of `latency` and `byte` seconds a byte; in float32."""
    gemm = Curve(((1, row), (1000, 1000 * row)))
    link = Curve(((1, latency + byte), (10**9, latency + 10**9 * byte)))
    return Timings(4, {(1, 1): gemm}, link, link, contention, measured or {})


def test_pipelines_by_hand():
    cost = {
        "gemm": lambda rows: 3 * rows,
        "all_reduce": lambda rows: 2 * rows,
        "contention": lambda rows: 0,
    }
    assert pipeline_seconds([10], **cost) == 30 + 20
    assert (
        pipeline_seconds([5, 5], **cost) == 30 + 10
    )  # the GEMM is the longer one: the last all-reduce is left over
    assert pipeline_seconds([6, 4], **cost) == 30 + 8  # less of it, with a smaller last chunk
    slow = {**cost, "all_reduce": lambda rows: 5 * rows}
    assert (
        pipeline_seconds([5, 5], **slow) == 15 + 50
    )  # the link is the longer one: the first GEMM is left over
    assert pipeline_seconds([2, 8], **slow) == 6 + max(10, 24) + 40
    assert (
        pipeline_seconds([10], **cost, trailing=15) == 50
        and pipeline_seconds([10], **cost, trailing=25) == 55
    )  # the longer of the two follows
    busy = {**cost, "contention": lambda rows: rows}
    assert pipeline_seconds([10], **busy) == 50  # nothing runs beside the only all-reduce
    assert pipeline_seconds([5, 5], **busy) == 30 + 5 + 10
    assert pipeline_seconds([5, 5], **busy, trailing=25) == 30 + 10 + 25


@quiet
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=12),
    seconds,
    seconds,
    st.floats(0, 10),
    st.floats(0, 1e4),
)
def test_pipeline_bounds(sizes, gemm, message, contention, trailing):
    """No faster than either resource alone, no slower than one after the other."""
    total = pipeline_seconds(
        sizes, lambda r: r * gemm, lambda r: r * message, lambda r: r * contention, trailing
    )
    rows, near = sum(sizes), 1 + 1e-9
    assert total * near >= max(rows * gemm + trailing, sizes[0] * gemm + rows * message)
    assert total <= near * (rows * (gemm + message + contention) + trailing)


@quiet
@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), seconds),
        min_size=1,
        max_size=8,
        unique_by=lambda point: point[0],
    ),
    st.integers(1, 10**7),
)
def test_curves(points, size):
    curve = Curve(tuple(sorted(points)))
    assert all(curve(at) == pytest.approx(value) for at, value in curve.points)
    ends = [value for at, value in curve.points]
    assert size > curve.points[-1][0] or min(ends) <= curve(size) * (1 + 1e-9) <= max(ends) * (
        1 + 2e-9
    )
    smooth = Curve.never_less_efficient(points)
    each = [value / at for at, value in smooth.points]
    assert all(a >= b * (1 - 1e-12) for a, b in zip(each, each[1:], strict=False))
    assert all(
        smooth(at) <= value * (1 + 1e-9) for at, value in points
    )  # noise is taken away, never added
    assert (
        Curve(((1, 2.0), (3, 4.0)))(2) == 3
        and Curve(((1, 2.0), (3, 4.0)))(6) == 8
        and Curve(((2, 1.0),))(1) == 1
    )


def test_candidates_leave_every_chunk_enough_rows():
    for rows in (1, 255, 256, 500, 4096):
        found = timings().predict(GemmShape(rows, 1, 1, False))
        assert list(found) == [n for n in CHUNK_COUNTS if n == 1 or rows >= n * MIN_ROWS]
        assert all(min(chunk_rows(rows, n, 4)[:-1], default=MIN_ROWS) >= MIN_ROWS for n in found)


def test_predictions_are_the_pipeline_over_the_ops_own_chunks():
    shape, cost = GemmShape(2048, 3, 5, True), timings(contention=1e-8, byte=1e-7)
    gemm, byte = 15e-3, 4 * 5 * 1e-7
    want = pipeline_seconds(
        [128, 384, 512, 512, 384, 128],
        lambda r: r * gemm,
        lambda r: r * byte,
        lambda r: r * 4 * 5 * 1e-8,
        2048 * gemm,
    )
    assert cost.predict(shape)[6] == pytest.approx(want)
    nearest = dataclasses.replace(cost, gemms={**cost.gemms, (3, 6): Curve(((1, 18e-6),))})
    assert nearest.gemm(10, 3, 5) == pytest.approx(10 * 15e-6) and nearest.gemm(
        10, 1, 1
    ) == pytest.approx(10e-3)


def test_margins():
    shape = GemmShape(2048, 1, 1, False)
    assert timings(byte=0.2e-3).decide(shape)[0] > 1
    chunks, why = timings(byte=0.01e-3).decide(shape)  # at most 4% to gain
    assert chunks == 1 and "predicted, less than the 5%" in why
    assert (
        timings(byte=0.2e-3, contention=0.2e-3).decide(shape)[0] == 1
    )  # all of it on the cores that the GEMM needs
    assert timings(byte=0.2e-3).decide(GemmShape(255, 1, 1, False)) == (
        1,
        "255 rows are fewer than two chunks of 128",
    )
    for second, chunks in (
        (0.99, 1),
        (0.97, 2),
        (1.5, 1),
    ):  # the measurement counts, whatever is predicted
        for byte in (0.01e-3, 0.2e-3):
            got, why = timings(byte=byte, measured={shape: {1: 1.0, 2: second, 4: 2.0}}).decide(
                shape
            )
            assert got == chunks and "measured" in why


@quiet
@given(st.integers(1, 20000), seconds, seconds, st.floats(0, 1e-3), st.booleans())
def test_never_predicted_slower_than_one_chunk(rows, row, byte, contention, weight_grad):
    cost, shape = timings(row, byte, contention), GemmShape(rows, 1, 1, weight_grad)
    predicted, (chunks, _) = cost.predict(shape), cost.decide(shape)
    assert predicted[chunks] <= predicted[1]


@quiet
@given(
    st.dictionaries(
        st.sampled_from([torch.float32, torch.bfloat16]),
        st.tuples(seconds, seconds, st.floats(0, 1)),
        min_size=1,
    )
)
def test_table_round_trip(rates):
    measured = {GemmShape(2048, 3, 5, True): {1: 0.5, 4: 0.25}}
    dtypes = {
        d: dataclasses.replace(timings(*rate, measured), itemsize=d.itemsize)
        for d, rate in rates.items()
    }
    assert Calibration.from_json(Calibration("here", "today", dtypes).to_json()) == Calibration(
        "here", "today", dtypes
    )


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
    layer_call = "auto", torch.empty(4096, 9), 8, group, 9
    chosen = chunks_and_channel(*layer_call)
    assert chosen is chunks_and_channel(*layer_call)  # looked up
    assert chosen[0] == choose("auto", 4096, 32, group, 9, torch.float32).chunks
    assert (
        choose("auto", 4096, 32, group, None, torch.float32).chunks == 1
    )  # shares that may differ: nothing to agree on
    assert (
        choose("auto", 4096, 32, group, 9, torch.float16).reason
        == choose("auto", 4096, 32, group).reason
    )  # not measured
    assert (
        choose(False, 4096, 32, group, 9, torch.float32).chunks == 1
        and choose(7, 4096, 32, group, 9, torch.float32).chunks == 7
    )

    # Uneven shares: 3 and 2, 2 and 1 ... features; the choice is still one.
    x, stock, back = (
        torch.randint(-3, 4, (4096, 5)).float(),
        torch.nn.Linear(5, 6),
        torch.nn.Linear(6, 5),
    )
    with torch.no_grad():
        for p in (*stock.parameters(), *back.parameters()):
            p.copy_(torch.randint(-3, 4, p.shape))
    row = tpk.nn.RowParallelLinear.from_linear(stock, group=group)
    column = tpk.nn.ColumnParallelLinear.from_linear(back, group=group)
    mine, y = (
        ShardSpec.chunks(5, group.size, -1).shard(x, rank),
        torch.zeros(4096, 6, requires_grad=True),
    )
    with tpk.log_collectives() as log:
        assert_close(row(mine), stock(x), atol=0, rtol=0)
        column(y).sum().backward()
        tpf.row_parallel_linear(
            mine, row.weight_and_bias()[0], group=group
        )  # a functional call without a split
    chunks = [(c.tag, c.chunks) for c in log if c.chunk == 0]
    assert_close(y.grad, back.weight.sum(0).expand(4096, 6), atol=0, rtol=0)
    explained = row.explain(4096), column.explain(4096)
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


def saved(folder, spoiled):
    os.environ["XDG_CACHE_HOME"] = folder
    rank, told = dist.get_rank(), []
    mesh = tpk.init_mesh(dist.get_world_size(), device="cpu")
    group = resolve_group(mesh["tp"])
    assert calibration_of(group) is None
    if spoiled is None:
        with mock.patch.multiple(
            "tpkernels.overlap.calibrate",
            GEMM_ROWS={"cpu": (16, 64)},
            ALL_REDUCE_BYTES=(64, 256),
            GEMM_SIZE={"cpu": 32},
            PROBE_BYTES=4096,
        ):
            table = tpk.tune(group, [(256, 8, 8)], [torch.float32])
    elif rank == 0:
        path = calibration_cache.CalibrationKey.of(group).path
        path.parent.mkdir(parents=True)
        path.write_text(spoiled)
    else:
        calibration_cache.CalibrationKey.of(group)
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = calibration_of(
            resolve_group(tpk.init_mesh(dist.get_world_size(), device="cpu")["tp"])
        )
    told = [str(w.message) for w in caught if "tpkernels tune" in str(w.message)]
    if spoiled is not None:
        return again, told, os.listdir(f"{folder}/tpkernels")
    assert again == table and calibration_of(group) is table and not told
    assert set(table.timings[torch.float32].measured) == {
        GemmShape(256, 8, 8, False),
        GemmShape(256, 8, 8, True),
    }
    assert all(list(times) == [1, 2] for times in table.timings[torch.float32].measured.values())
    return table, told, os.listdir(f"{folder}/tpkernels")


def test_tuned_saved_and_handed_out_by_init_mesh(pool, tmp_path):
    (first, _, files), *others = pool.run(2, saved, str(tmp_path), None)
    assert all(table == first for table, *_ in others)
    (name,) = files  # and nothing half-written beside it
    assert name.startswith("calibration-") and "shm-on-1-host-2-ranks" in name
    assert Calibration.from_json((tmp_path / "tpkernels" / name).read_text()) == first


@pytest.mark.parametrize(
    "spoiled",
    [
        "",
        "{",
        "[]",
        '{"measured_on": "", "date": ""}',
        '{"measured_on": "", "date": "", "dtypes": {"load": {}}}',
    ],
)
def test_a_table_that_cannot_be_read_is_a_warning(pool, tmp_path, spoiled):
    for rank, (table, told, _) in enumerate(pool.run(2, saved, str(tmp_path), spoiled)):
        assert (
            table is None
            and len(told) == (rank == 0)
            and all("cannot be read" in text for text in told)
        )


def test_tables_with_wrong_numbers_are_refused():
    right = Calibration(
        "here", "today", {torch.float32: timings(measured={GemmShape(4, 1, 1, False): {1: 1.0}})}
    )
    change = {"itemsize": 4}
    for wrong in (
        dict(gemms={}),
        dict(all_reduces=Curve(())),
        dict(all_reduces=Curve(((2, 1.0), (1, 2.0)))),
        dict(chunked_all_reduces=Curve(((1, -1.0),))),
        dict(measured={GemmShape(4, 1, 1, False): {2: 1.0}}),
    ):
        text = Calibration(
            "here",
            "today",
            {torch.float32: dataclasses.replace(right.timings[torch.float32], **wrong, **change)},
        ).to_json()
        with pytest.raises(ValueError):
            Calibration.from_json(text)


def other_hosts():
    told = []
    with (
        mock.patch.object(
            calibration_cache.socket, "gethostname", lambda: f"host {dist.get_rank()}"
        ),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        tpk.init_mesh(2, device="cpu")
        told = [str(w.message) for w in caught]
    return told


def test_an_unmeasured_link_between_hosts_is_said_once(pool):
    first, second = pool.run(2, other_hosts)
    assert sum("2 hosts" in text and "tpk.tune(group)" in text for text in first) == 1 and not any(
        "hosts" in text for text in second
    )


def refused():
    for shapes in ([(1, 2)], [(1, 2, 0)], [(1, 2.0, 3)], [5]):
        with pytest.raises(ValueError, match=r"shapes must be .*ints of at least 1"):
            tpk.tune(dist.group.WORLD, shapes)


def test_bad_shapes_are_refused_before_anything_is_measured(pool):
    pool.run(2, refused)


def compiled():
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


def test_torch_compile_takes_a_tuned_layer_whole(pool):
    pool.run(2, compiled)
