"""`tpkernels trace` on small traces, and its interval arithmetic against counting nanoseconds."""

import gzip
import json
import sqlite3

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from traces import ADD, ALL_REDUCE, GEMM, KERNELS, nsys
from typer.testing import CliRunner

from tpkernels.cli import app
from tpkernels.profiling.trace import intersection, kind_of, length, read_trace, report, union

CLEAN, OURS, THEIRS = 77, 3, 4  # process, domain numbers


def trace(*args):
    return CliRunner().invoke(app, ["trace", *map(str, args)], env={"COLUMNS": "160"})


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
            "void tpkernels::two_shot<__nv_bfloat16, 4, false>"
            "(tpkernels::Arguments<__nv_bfloat16>)",
            "collective",
        ),
        ("column_linear_act_kernel", "gemm"),
        ("void one_shot_all_reduce_kernel<float, 2>(float**, gemm*)", "collective"),
        ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn", "gemm"),
        (
            "void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm_128x128_16x5_tn_align4>"
            "(cutlass_80_tensorop::Params)",
            "gemm",
        ),
        ("void gemv2T_kernel_val<int, int, float>(cublasGemvParamsEx<int>)", "gemm"),
        (
            "void pytorch_flash::flash_fwd_kernel<"
            "Flash_fwd_kernel_traits<64, cutlass::gemm::GemmShape<128>>>(Params)",
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
