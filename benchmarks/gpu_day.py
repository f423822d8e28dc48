"""`make gpu-day`: everything that waits for a GPU, in one run that leaves a JSON file and a page.

A step that cannot run here is skipped and says why. A step that fails does not stop the others, and
the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tpkernels_planner.files import write_atomically  # noqa: E402

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
# One GPU serves two ranks: then the kernels run, not NCCL, and no time means anything.
SHARED = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"} if GPUS == 1 else {}
HOUR = 3600  # seconds


def _no_cuda() -> str | None:
    if torch.version.cuda:
        return None
    return f"torch {torch.__version__} was not built for CUDA"


def _no_gpu() -> str | None:
    return None if GPUS else _no_cuda() or "no GPU here"


def missing(tool: str) -> str | None:
    """Returns why a step that needs a GPU and this tool cannot run, or None."""
    if _no_gpu() is None and shutil.which(tool) is None:
        return f"{tool} is not on the PATH"
    return _no_gpu()


@dataclass
class Step:
    """A command, and how to read its figures.

    Attributes:
        skip: why it cannot run here, or None.
        timeout: seconds.
        figures: reads the figures from the output.
        environment: variables set for it.
    """

    name: str
    command: list[str]
    skip: str | None = None
    timeout: int = HOUR // 2
    figures: Callable[[str], dict] = lambda output: {}
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    name: str
    status: str  # passed, failed, skipped
    why: str = ""
    command: str = ""
    seconds: float = 0.0
    figures: dict = field(default_factory=dict)
    log: str = ""


def pytest_counts(output: str) -> dict[str, int]:
    """Returns pytest's counts (passed, failed, ...) from the last summary in its output."""
    summaries = re.findall(r"^=* ?(\d+ [a-z]+.*) in [\d.]+s", output, re.M)
    if not summaries:
        return {}
    counts = re.findall(r"(\d+) (passed|failed|skipped|errors?|xfailed)", summaries[-1])
    return {word: int(count) for count, word in counts}


def from_json(path: Path) -> Callable[[str], dict]:
    """Returns a reader of the statistics that pytest-benchmark wrote to `path`."""

    def read(output: str) -> dict:
        runs = json.loads(path.read_text())["benchmarks"] if path.exists() else []
        keys = ("min", "median", "iqr", "rounds")
        return {run["fullname"]: {key: run["stats"][key] for key in keys} for run in runs}

    return read


def steps(folder: Path) -> Iterator[Step]:
    """Yields the steps of the day, in order; `folder` takes what they write."""
    python = sys.executable
    ranks = str(max(GPUS, 1))
    pytest = [python, "-m", "pytest", "-q"]
    gpu_tests = [*pytest, "-m", "gpu"]
    yield Step("environment", [python, "-m", "tpkernels", "env", "--json"], figures=json.loads)
    yield Step("topology", ["nvidia-smi", "topo", "-m"], missing("nvidia-smi"))
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--editable", "."]
    yield Step("build", [python, *install], _no_cuda() and _no_gpu(), HOUR)
    yield Step("tests", [*gpu_tests, "tests"], _no_gpu(), HOUR, pytest_counts, SHARED)
    for tool in ("memcheck", "synccheck", "racecheck"):
        sanitizer = f"compute-sanitizer --tool {tool} --target-processes all --error-exitcode 9"
        tests = [*gpu_tests, "tests/gpu/test_peer_kernels.py", "-k", "sums or layers"]
        command = [*sanitizer.split(), *tests]
        reason = missing("compute-sanitizer")
        name = f"compute-sanitizer {tool}"
        yield Step(name, command, reason, HOUR, pytest_counts, SHARED)
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m tpkernels tune"
    yield Step("tuning", [python, *torchrun.split()], _no_gpu())
    results = folder / "benchmarks.json"
    suite = [*pytest, "benchmarks", "--ignore=benchmarks/bench_link.py", "--benchmark-only"]
    command = [*suite, f"--benchmark-json={results}"]
    yield Step("benchmarks", command, _no_gpu(), HOUR, from_json(results))
    command = ["bash", "benchmarks/nsys.sh", ranks, str(folder / "profiles")]
    yield Step("profile", command, missing("nsys"), environment={"PYTHON": python})


def run(step: Step, folder: Path) -> Result:
    result = Result(step.name, "skipped", step.skip or "", " ".join(step.command))
    if step.skip:
        return result
    log = folder / f"{step.name.replace(' ', '-')}.log"
    result.log = log.name
    began = time.monotonic()
    try:
        with log.open("w") as out:
            done = subprocess.run(
                step.command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **step.environment},
                timeout=step.timeout,
            )
        result.status = "passed"
        if done.returncode != 0:
            result.status, result.why = "failed", f"exit status {done.returncode}"
    except (subprocess.TimeoutExpired, OSError) as error:
        result.status, result.why = "failed", str(error)
    result.seconds = round(time.monotonic() - began, 1)
    try:
        result.figures = step.figures(log.read_text())
    except ValueError as error:
        result.figures = {"unreadable": str(error)}
    return result


def report(facts: dict, results: list[Result]) -> str:
    """Returns the page: the facts, a row for each step, and the figures of those that have any."""
    lines = ["# GPU day", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["| step | | seconds | |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.status} | {r.seconds or ''} | {r.why} |" for r in results]
    for r in results:
        if r.figures:
            lines += ["", f"## {r.name}", "", f"`{r.command}`", ""]
            lines += [f"- {key}: {value}" for key, value in r.figures.items()]
    return "\n".join(lines) + "\n"


def facts() -> dict:
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "GPUs": [torch.cuda.get_device_name(i) for i in range(GPUS)] or _no_gpu(),
        "ranks share a GPU": bool(SHARED),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    text = "folder of the JSON file, the page and the logs"
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-day", help=text)
    folder = parser.parse_args().out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    found = facts()
    results = []
    for step in steps(folder):
        print(f"{step.name}: ", end="", flush=True)
        results.append(run(step, folder))
        print(f"{results[-1].status} {results[-1].why}".rstrip())
        # Written after each step: if the day ends early, the results so far are kept.
        day = {**found, "steps": [asdict(result) for result in results]}
        write_atomically(folder / "gpu-day.json", json.dumps(day, indent=1))
        write_atomically(folder / "gpu-day.md", report(found, results))
    print(f"{folder / 'gpu-day.md'} and gpu-day.json")
    return int(any(result.status == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
