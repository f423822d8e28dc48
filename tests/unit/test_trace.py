"""`tpkernels trace` on small traces with the real column names, and its interval arithmetic against counting nanoseconds."""

import gzip
import json
import sqlite3

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tpkernels.cli import app
from tpkernels.profiling.trace import intersection, kind_of, length, read_trace, report, union

ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GEMM = "nvjet_tst_192x192_64x4_1x2_h_bz_TNT"
ADD = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int, at::native::CUDAFunctor_add<float>)"
PROCESS = 0x1000000  # of a globalPid, and of a globalTid above its thread
CLEAN, OURS, THEIRS = 77, 3, 4  # process, domain numbers


def trace(*args):
    return CliRunner().invoke(app, ["trace", *map(str, args)], env={"COLUMNS": "160"})


def nsys(
    path, kernels=(), events=(), tables=("StringIds", "NVTX_EVENTS", "CUPTI_ACTIVITY_KIND_KERNEL")
):
    """`kernels`: (process, device, stream, start, end, name); `events`: (start, end, type, process, domain, text, registered)."""
    schemas = {
        "StringIds": "id INTEGER PRIMARY KEY, value TEXT NOT NULL",
        "NVTX_EVENTS": "start INT NOT NULL, end INT, eventType INT NOT NULL, rangeId INT, category INT, color INT, text TEXT, "
        "globalTid INT, endGlobalTid INT, textId INT, domainId INT, uint64Value INT",
        "CUPTI_ACTIVITY_KIND_KERNEL": "start INT NOT NULL, end INT NOT NULL, deviceId INT NOT NULL, contextId INT NOT NULL, "
        "streamId INT NOT NULL, correlationId INT, globalPid INT, demangledName INT NOT NULL, shortName INT NOT NULL",
    }
    db = sqlite3.connect(path)
    for table in tables:
        db.execute(f"CREATE TABLE {table} ({schemas[table]})")

    def string(value):
        found = db.execute("SELECT id FROM StringIds WHERE value = ?", (value,)).fetchone()
        return (
            found[0]
            if found
            else db.execute("INSERT INTO StringIds (value) VALUES (?)", (value,)).lastrowid
        )

    for process, device, stream, start, end, name in kernels:
        row = (
            start,
            end,
            device,
            1,
            stream,
            0,
            process * PROCESS,
            string(name),
            string(name.partition("<")[0]),
        )
        db.execute(f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({','.join('?' * 9)})", row)
    for start, end, kind, process, domain, text, registered in events:
        inline, text_id = (None, string(text)) if registered else (text, None)
        row = (
            start,
            end,
            kind,
            None,
            None,
            None,
            inline,
            process * PROCESS + 5,
            None,
            text_id,
            domain,
            None,
        )
        db.execute(f"INSERT INTO NVTX_EVENTS VALUES ({','.join('?' * 12)})", row)
    db.commit()
    db.close()
    return path


KERNELS = [
    # Device 0: two all-reduces; the first is under a GEMM in 100 of 200 ns and under an add in 20 more, the second exposed.
    (7, 0, 1, 0, 300, GEMM),
    (7, 0, 2, 200, 400, ALL_REDUCE),
    (7, 0, 1, 350, 370, ADD),
    (7, 0, 2, 1000, 1100, ALL_REDUCE),
    # Device 1: nested (within one GEMM, within one all-reduce), touching (500, 600), and both collectives at once (700 to 720).
    (7, 1, 1, 0, 500, GEMM),
    (7, 1, 2, 100, 150, ALL_REDUCE),
    (7, 1, 2, 500, 600, ALL_REDUCE),
    (7, 1, 1, 600, 680, GEMM),
    (7, 1, 2, 680, 800, ALL_REDUCE),
    (7, 1, 3, 700, 720, ALL_REDUCE),
    (7, 1, 1, 690, 695, ADD),
    (7, 1, 3, 692, 710, GEMM),
    # Another process on device 0, which hides nothing of the first one's.
    (8, 0, 1, 200, 1200, GEMM),
]


def test_overlap_of_devices_streams_and_processes(tmp_path):
    result = report(*read_trace(nsys(tmp_path / "t.sqlite", KERNELS)))
    rows = {(row.pop("process"), row.pop("device")): row for row in result["devices"]}
    assert rows[7, 0] == dict(collective_ns=300, hidden_ns=120, exposed_ns=180, gemm_ns=300)
    assert rows[7, 1] == dict(
        collective_ns=50 + 100 + 120, hidden_ns=50 + 20, exposed_ns=200, gemm_ns=500 + 80 + 18
    )
    assert rows[8, 0] == dict(collective_ns=0, hidden_ns=0, exposed_ns=0, gemm_ns=1000)
    assert result["overlap"] == dict(
        collective_ns=570, hidden_ns=190, exposed_ns=380, gemm_ns=1898, efficiency=190 / 570
    )
    kernels = {k["name"]: (k["kind"], k["count"], k["total_ns"]) for k in result["kernels"]}
    assert kernels == {
        ALL_REDUCE: ("collective", 6, 590),
        GEMM: ("gemm", 5, 1898),
        ADD: ("other", 2, 25),
    }


def test_ranges_of_the_domain_alone(tmp_path):
    events = [
        (0, None, 75, CLEAN, OURS, "tpkernels", False),
        (0, None, 75, 78, OURS, "NCCL", True),  # the same number, another process's domain
        (0, None, 75, 78, THEIRS, "tpkernels", True),
        (10, 30, 59, CLEAN, OURS, "row[1/2] gemm", False),
        (30, 35, 59, CLEAN, OURS, "row[1/2] all_reduce", True),
        (40, 45, 60, CLEAN, OURS, "row[1/2] gemm", True),
        (50, 70, 59, CLEAN, THEIRS, "another domain", False),
        (50, 70, 59, CLEAN, 0, "no domain", False),
        (50, 70, 59, 78, OURS, "NCCL's", False),
        (80, 81, 59, 78, THEIRS, "row[1/2] gemm", False),
        (90, None, 59, CLEAN, OURS, "still open", False),
        (91, None, 34, CLEAN, OURS, "a mark", False),
    ]
    path = nsys(tmp_path / "t.sqlite", events=events, tables=("StringIds", "NVTX_EVENTS"))
    result = report(*read_trace(path))
    assert result["ranges"] == [
        dict(name="row[1/2] gemm", count=3, total_ns=26),
        dict(name="row[1/2] all_reduce", count=1, total_ns=5),
    ]
    assert result["overlap"]["efficiency"] is None
    run = trace(path)
    assert (
        run.exit_code == 0
        and "row[1/2] all_reduce" in run.output
        and "No GPU kernels" in run.output
    )


def test_the_command_prints_and_writes_the_figures(tmp_path):
    path = nsys(tmp_path / "t.sqlite", KERNELS)
    run = trace(path, "--json", tmp_path / "out.json")
    assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "out.json").read_text()) == report(*read_trace(path))
    assert (
        "collective" in run.output
        and "33.3%" in run.output
        and "25.9%" in run.output
        and "no collectives" in run.output
    )


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_chrome_traces_give_the_same_figures(tmp_path, suffix):
    def event(process, device, stream, start, end, name):
        args = {"device": device, "stream": stream}
        return {
            "ph": "X",
            "cat": "kernel",
            "name": name,
            "pid": device,
            "tid": stream,
            "ts": start / 1000,
            "dur": (end - start) / 1000,
            "args": args,
        }

    mine = [kernel for kernel in KERNELS if kernel[0] == 7]
    others = [
        {"ph": "M", "name": "process_name", "pid": 0, "args": {}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 2, "args": {}},
    ]
    path = tmp_path / f"t{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wt") as file:
        json.dump(
            {"schemaVersion": 1, "traceEvents": [*others, *(event(*kernel) for kernel in mine)]},
            file,
        )
    want = report(*read_trace(nsys(tmp_path / "t.sqlite", mine)))["overlap"]
    assert report(*read_trace(path))["overlap"] == want


def test_bad_input(tmp_path):
    text, empty, other = (
        tmp_path / "report.nsys-rep",
        tmp_path / "empty.sqlite",
        tmp_path / "other.sqlite",
    )
    text.write_text("no database")
    nsys(empty)
    nsys(other, tables=("StringIds",))
    cut = tmp_path / "cut.sqlite"
    cut.write_bytes(nsys(tmp_path / "whole.sqlite", KERNELS).read_bytes()[:3000])
    old = tmp_path / "old.sqlite"
    db = sqlite3.connect(old)
    db.execute("CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INT)")
    db.close()
    broken = tmp_path / "broken.json"
    broken.write_text('{"traceEvents": [{"cat": "kernel", "ph": "X"}]}')
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(2).add_(1)
    profile.export_chrome_trace(str(tmp_path / "cpu.json"))
    for path, message in (
        (tmp_path / "missing.sqlite", "no such file"),
        (text, "nsys export --type sqlite"),
        (empty, "no GPU kernels"),
        (other, "neither NVTX_EVENTS nor CUPTI_ACTIVITY_KIND_KERNEL"),
        (cut, "nsys export --type sqlite"),
        (old, "no such"),
        (broken, "not a Chrome trace"),
        (tmp_path / "cpu.json", "no GPU kernels"),
    ):
        run = trace(path)
        assert run.exit_code == 1 and message in run.stderr and run.stdout == "", (
            path,
            run.output,
            run.exception,
        )
    run = trace(nsys(tmp_path / "t.sqlite", KERNELS), "--json", tmp_path / "no" / "file.json")
    assert run.exit_code == 1 and "No such file" in run.stderr


@pytest.mark.parametrize(
    "name, kind",
    [
        (
            "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
            "collective",
        ),
        (
            "void tpkernels::two_shot<__nv_bfloat16, 4, false>(tpkernels::Arguments<__nv_bfloat16>)",
            "collective",
        ),
        ("column_linear_act_kernel", "gemm"),
        ("void one_shot_all_reduce_kernel<float, 2>(float**, gemm*)", "collective"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "gemm"),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x5_tn_align4>(cutlass_80_tensorop::Params)",
            "gemm",
        ),
        ("void gemv2T_kernel_val<int, int, float>(cublasGemvParamsEx<int>)", "gemm"),
        (
            "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::gemm::GemmShape<128>>>(Params)",
            "other",
        ),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(float)", "other"),
        (
            "void at::native::(anonymous namespace)::vectorized_gather_kernel<16, long>(char*)",
            "other",
        ),
        ("void (anonymous namespace)::splitKreduce_kernel<32, 16>(float*)", "gemm"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


INTERVALS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0], sum(pair))),
    max_size=8,
)


@given(INTERVALS, INTERVALS)
def test_interval_arithmetic(a, b):
    def covered(intervals):
        return {t for start, end in intervals for t in range(start, end)}

    for intervals in (a, b):
        merged = union(intervals)
        assert covered(merged) == covered(intervals) and length(merged) == len(covered(intervals))
        assert all(left[1] < right[0] for left, right in zip(merged, merged[1:], strict=False))
    common = intersection(union(a), union(b))
    assert covered(common) == covered(a) & covered(b) and length(common) == len(
        covered(a) & covered(b)
    )
