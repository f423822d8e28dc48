"""The benchmarks' arithmetic, the settings they refuse, and a run of each of them.

Every benchmark must run, write its JSON and be drawn. No time is asserted.
"""

import doctest
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import formatting  # noqa: E402
import tables  # noqa: E402
import team  # noqa: E402
import timing  # noqa: E402
from results import STEPS  # noqa: E402


class Alone:
    """A world of one rank."""

    rank, device = 0, "cpu"

    def barrier(self):
        pass

    def broadcast(self, value):
        return value


@pytest.mark.parametrize(
    ("name", "value"), [("TORCH_NCCL_ENABLE_TIMING", "1"), ("TORCH_DISTRIBUTED_DEBUG", "detail")]
)
def test_refuses_what_breaks_overlap(name, value):
    with pytest.raises(RuntimeError, match=f"{name}={value}.*unset {name}"):
        timing.refuse_environment({name: value})
    timing.refuse_environment({name: "0" if name.endswith("TIMING") else "INFO"})


def test_ratio_is_taken_round_by_round():
    ours = [[1.0, 1.0, 9.0], [10.0, 10.0, 10.0], [2.0]]
    other = [[2.0], [30.0, 30.0], [8.0, 8.0, 0.1]]
    ratio = timing.ratio(other, ours)  # the rounds' are 2, 3 and 4
    assert (ratio["median"], ratio["rounds"]) == (3.0, 3)
    assert ratio["p10"] == pytest.approx(2.2) and ratio["p90"] == pytest.approx(3.8)
    assert timing.difference(other, ours)["median"] == 6.0
    assert timing.ratio([[3.0]], [[2.0]])["p90"] == 1.5


@pytest.mark.parametrize(("overlapped", "share"), [(5.0, 0.0), (3.0, 1.0), (4.0, 0.5), (6.0, -0.5)])
def test_hidden_share(overlapped, share):
    assert timing.hidden_share(3.0, 2.0, overlapped) == share
    assert timing.hidden_share(2.0, 3.0, overlapped) == share


def test_numbers_are_written_as_people_write_them():
    assert doctest.testmod(formatting).failed == 0
    assert formatting.ratio({"median": 473.2, "p10": 141.9, "p90": 844.0}) == "470x (140-840)"
    assert [formatting.number(value) for value in (0, -16.41, 9.999, 18000)] == [
        "0.00",
        "-16.4",
        "10.0",
        "18,000",
    ]
    assert formatting.seconds(9.999e-4) == "1,000 µs"
    # 5% of the layer's time is the least that is worth a share.
    assert (tables.hidden(0.7, 5.0, 100.0), tables.hidden(-164.2, 4.9, 100.0)) == ("70%", "-")


def test_paired_counts_the_same_calls_of_each():
    calls = {"a": 0, "b": 0}

    def contender(name):
        def call():
            calls[name] += 1

        return timing.Contender(call)

    rounds = timing.paired({name: contender(name) for name in calls}, Alone(), seconds=0.01)
    assert calls["a"] == calls["b"]
    assert len(rounds["a"]) == len(rounds["b"]) >= timing.MIN_ROUNDS
    # The first three calls of each block are not among them.
    assert all(len(times) == timing.MAX_CALLS for times in rounds["a"])
    assert calls["a"] == 4 + len(rounds["a"]) * (3 + timing.MAX_CALLS)


def test_peak_is_what_a_call_holds():
    size = 64 << 20
    peak = timing.peak(lambda: bytearray(b"\x01") * size, "cpu")
    assert 0.9 * size < peak < 2 * size  # the kernel counts pages in batches


def rank_one_fails(world):
    if world.rank == 1:
        raise ArithmeticError("on purpose")
    time.sleep(100)


def test_a_rank_that_fails_is_named_and_none_is_left(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(team, "GRACE", 1)
    pair = team.Team(2, [])
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*rank_one_fails.*on purpose"):
        pair.run("test_benchmarks", "rank_one_fails")
    assert not pair.alive and all(process.returncode is not None for process in pair.processes)
    assert not Path(pair.folder.name).exists()


@pytest.fixture(scope="module")
def smoke_results(tmp_path_factory):
    """Runs every benchmark on one tiny case; returns the path of its JSON file."""
    results = tmp_path_factory.mktemp("smoke") / "results.json"
    options = ["-q", "--smoke", f"--benchmark-json={results}"]
    command = [sys.executable, "-m", "pytest", *options, "benchmarks"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout + run.stderr
    return results


def test_every_benchmark_runs(smoke_results):
    records = json.loads(smoke_results.read_text())["benchmarks"]
    found = [record["extra_info"] for record in records]
    files = (ROOT / "benchmarks").glob("bench_*.py")
    measured = {path.stem.removeprefix("bench_") for path in files} - {"fused", "link"}
    assert {info["name"] for info in found} == measured
    ours = [info for info in found if info["contender"] == "tpkernels"]
    beside_torch = [info for info in ours if info["name"] not in ("layer_cost", "debug")]
    assert all(info["ratios"].keys() >= {"torch"} for info in beside_torch)
    layers = [info for info in ours if info["name"] in tables.LAYERS]
    assert all(info["ratios"].keys() >= set(STEPS) for info in layers)
    mlp = next(info for info in layers if info["name"] == "mlp")
    assert mlp["components"].keys() == {
        "overlapped",
        "serial",
        "GEMM",
        "all-reduce",
        "ideal",
        "hidden",
        "gains",
    }
    assert mlp["memory"]["parameters"] > 0


def test_the_page_and_its_pictures_are_drawn(smoke_results, tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- mlp -->\nold\n<!-- /mlp -->\nafter\n")
    command = [sys.executable, "benchmarks/plot.py", "--page", str(page), str(smoke_results)]
    subprocess.run([*command, "--tables-only"], cwd=ROOT, check=True, timeout=100)
    text = page.read_text()
    assert text.startswith("before\n<!-- mlp -->\n")
    assert text.endswith("<!-- /mlp -->\nafter\n") and "old" not in text
    assert "tpkernels" in text and "16 tokens" in text
    assert "| gain of | tpkernels' all-reduce | its GEMM |" in text
    pytest.importorskip("matplotlib")
    subprocess.run(command, cwd=ROOT, check=True, timeout=100)
    assert (tmp_path / "images" / "mlp.svg").exists()
