"""The engine's NVTX ranges, as a tool receives them.

The tool is tests/proofs/nvtx/recorder.c, which nvtx3 loads in place of a profiler.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NVIDIA = importlib.util.find_spec("nvidia")
HEADERS = next(
    (
        h.parent
        for folder in (NVIDIA and NVIDIA.submodule_search_locations) or ()
        for h in Path(folder).glob("*/include/nvtx3")
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    HEADERS is None, reason="needs the nvidia-nvtx wheel (requirements-dev.txt)"
)


def build(*command) -> None:
    subprocess.run([str(part) for part in command], check=True, timeout=120)


@pytest.fixture(scope="module")
def recorder(tmp_path_factory):
    library = tmp_path_factory.mktemp("nvtx") / "librecorder.so"
    build(
        "gcc",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Werror",
        "-I",
        HEADERS,
        HERE / "nvtx/recorder.c",
        "-o",
        library,
    )
    return library


def environment(record, recorder=None):
    env = {
        **os.environ,
        "NVTX_RECORD": str(record),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    env.pop("NVTX_INJECTION64_PATH", None)
    return env if recorder is None else {**env, "NVTX_INJECTION64_PATH": str(recorder)}


def read_ranges(path) -> list[tuple[int, str]]:
    """Return (depth, name) of each range of the domain "tpkernels" in the order of their starts.

    Every range must end once.
    """
    ranges, depth = [], 0
    for line in path.read_text().splitlines():
        what, domain, name = line.split(" ", 2)
        assert domain == "tpkernels", line
        if what == "push":
            ranges.append((depth, name))
            depth += 1
        else:
            depth -= 1
        assert depth >= 0
    assert depth == 0
    return ranges


def chunks(pipeline, count, *steps):
    return [f"{pipeline}[{i + 1}/{count}] {step}" for i in range(count) for step in steps]


def test_every_gemm_and_collective_has_its_range(recorder, tmp_path):
    command = [sys.executable, str(HERE / "nvtx/rank.py")]
    env = environment(tmp_path / "record", recorder)
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store")], env=env)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    launches = ("gemm", "all_reduce")
    want = {
        "row, one chunk": [*chunks("row", 1, *launches), *chunks("row", 1, "wait")],
        "row, three chunks, residual": [
            *chunks("row", 3, *launches),
            *chunks("row", 3, "wait", "epilogue"),
        ],
        "column backward, two chunks": [
            *chunks("column", 2, *launches),
            "column wgrad",
            *chunks("column", 2, "wait"),
        ],
        "embedding": ["embedding lookup", "embedding all_reduce", "embedding wait"],
        "loss": ["loss all_reduce", "loss wait"] * 2,
        "gather": ["gather_output all_gather", "gather_output wait"],
        # The range that something throws in ends, and what was in flight is waited for.
        "an epilogue throws": [*chunks("row", 2, *launches), *chunks("row", 2, "wait", "epilogue")],
        "a GEMM throws": [
            "column[1/2] gemm",
            "column[1/2] all_reduce",
            "column[2/2] gemm",
            "column[1/2] wait",
        ],
        "Python throws": [],
    }
    flat = [
        entry
        for case, names in want.items()
        for entry in [(0, case), *((1, name) for name in names)]
    ]
    for process in ranks:
        assert read_ranges(tmp_path / f"record.{process.pid}") == flat


def test_a_range_without_a_tool_allocates_nothing(recorder, tmp_path):
    compiler = [
        "g++",
        "-std=c++17",
        "-O1",
        "-I",
        HERE.parents[1] / "csrc/engine",
        HERE / "nvtx/allocations.cpp",
    ]
    build(*compiler, "-I", HEADERS, "-o", tmp_path / "with_headers", "-ldl")
    build(*compiler, "-o", tmp_path / "without_headers")

    def allocations(program, recorder=None):
        run = subprocess.run(
            [tmp_path / program],
            env=environment(tmp_path / "record", recorder),
            capture_output=True,
            timeout=60,
            check=True,
        )
        return int(run.stdout)

    assert allocations("with_headers") == allocations("without_headers") == 0
    assert not list(tmp_path.glob("record*"))
    assert allocations("with_headers", recorder) >= 100
    (record,) = tmp_path.glob("record*")
    assert read_ranges(record)[:3] == [
        (0, "outer step"),
        (1, "inner[3/8] step"),
        (0, "longer than the buffer inside a std::string[1/100] all_reduce"),
    ]
