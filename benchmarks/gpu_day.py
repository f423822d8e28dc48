"""`make gpu-day`: everything that waits for a GPU, in one run that leaves one JSON file and one page.

A step that cannot run here is skipped and says why; a step that fails does not stop the others, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
NO_GPU = (
    None
    if GPUS
    else "no GPU here"
    if torch.version.cuda
    else f"torch {torch.__version__} was not built for CUDA"
)
# One GPU serves two ranks: the kernels, not NCCL, run then, and no time means anything.
SHARED = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"} if GPUS == 1 else {}


@dataclass
class Step:
    name: str
    command: list[str]
    skip: str | None = None
    timeout: int = 1800
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


def pytest_counts(output: str) -> dict:
    summary = re.findall(r"^=* ?(\d+ [a-z]+.*) in [\d.]+s", output, re.M)
    return (
        {
            word: int(count)
            for count, word in re.findall(
                r"(\d+) (passed|failed|skipped|errors?|xfailed)", summary[-1]
            )
        }
        if summary
        else {}
    )


def from_json(path: Path) -> Callable[[str], dict]:
    def read(output: str) -> dict:
        runs = json.loads(path.read_text())["benchmarks"] if path.exists() else []
        return {
            run["fullname"]: {key: run["stats"][key] for key in ("min", "median", "iqr", "rounds")}
            for run in runs
        }

    return read


def missing(tool: str) -> str | None:
    return NO_GPU or (None if shutil.which(tool) else f"{tool} is not on the PATH")


def steps(folder: Path) -> Iterator[Step]:
    python = sys.executable
    ranks = str(max(GPUS, 1))
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    gpu_tests = [python, "-m", "pytest", "-q", "-m", "gpu"]
    bench = folder / "benchmarks.json"
    no_compiler = NO_GPU if not torch.version.cuda else None
    yield Step("environment", [python, "-m", "tpkernels", "env", "--json"], figures=json.loads)
    yield Step("topology", ["nvidia-smi", "topo", "-m"], missing("nvidia-smi"))
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--editable",
        ".",
    ]
    yield Step("build", install, no_compiler, 3600)
    yield Step("tests", [*gpu_tests, "tests"], NO_GPU, 3600, pytest_counts, SHARED)
    for tool in ("memcheck", "synccheck", "racecheck"):
        sanitizer = [
            "compute-sanitizer",
            "--tool",
            tool,
            "--target-processes",
            "all",
            "--error-exitcode",
            "9",
        ]
        command = [*sanitizer, *gpu_tests, "tests/gpu/test_peer_kernels.py", "-k", "sums or layers"]
        yield Step(
            f"compute-sanitizer {tool}",
            command,
            missing("compute-sanitizer"),
            3600,
            pytest_counts,
            SHARED,
        )
    yield Step("tuning", [*torchrun, "-m", "tpkernels", "tune"], NO_GPU)
    suite = [python, "-m", "pytest", "-q", "benchmarks", "--ignore=benchmarks/bench_link.py"]
    pedantic = [*suite, "--benchmark-only", f"--benchmark-json={bench}"]
    yield Step("benchmarks", pedantic, NO_GPU, 3600, from_json(bench))
    yield Step(
        "profile",
        ["bash", "benchmarks/nsys.sh", ranks, str(folder / "profiles")],
        missing("nsys"),
        environment={"PYTHON": python},
    )


def run(step: Step, folder: Path) -> Result:
    result = Result(step.name, "skipped", step.skip or "", " ".join(step.command))
    if step.skip:
        return result
    log = folder / f"{step.name.replace(' ', '-')}.log"
    result.log, began = log.name, time.monotonic()
    try:
        with log.open("w") as out:
            environment = {**os.environ, **step.environment}
            done = subprocess.run(
                step.command,
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                timeout=step.timeout,
            )
        result.status, result.why = (
            ("passed", "") if done.returncode == 0 else ("failed", f"exit status {done.returncode}")
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        result.status, result.why = "failed", str(error)
    result.seconds = round(time.monotonic() - began, 1)
    try:
        result.figures = step.figures(log.read_text())
    except ValueError as error:
        result.figures = {"unreadable": str(error)}
    return result


def page(facts: dict, results: list[Result]) -> str:
    lines = ["# GPU day", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["| step | | seconds | |", "|---|---|---|---|"]
    lines += [f"| {r.name} | {r.status} | {r.seconds or ''} | {r.why} |" for r in results]
    for r in results:
        if r.figures:
            lines += ["", f"## {r.name}", "", f"`{r.command}`", ""]
            lines += [f"- {key}: {value}" for key, value in r.figures.items()]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Beside, then renamed: never half a file."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "gpu-day",
        help="folder of the JSON file, the page and the logs",
    )
    folder = parser.parse_args().out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "GPUs": [torch.cuda.get_device_name(i) for i in range(GPUS)] or NO_GPU,
        "ranks share a GPU": bool(SHARED),
    }
    results = []
    for step in steps(folder):
        print(f"{step.name}: ", end="", flush=True)
        results.append(run(step, folder))
        print(f"{results[-1].status} {results[-1].why}".rstrip())
        # After each step: whatever ends the day early, what was found is kept.
        write(
            folder / "gpu-day.json",
            json.dumps({**facts, "steps": [asdict(r) for r in results]}, indent=1),
        )
        write(folder / "gpu-day.md", page(facts, results))
    print(f"{folder / 'gpu-day.md'} and gpu-day.json")
    return int(any(r.status == "failed" for r in results))


if __name__ == "__main__":
    sys.exit(main())
