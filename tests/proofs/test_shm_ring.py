"""The shm transport's protocol under ThreadSanitizer, and that its orderings are needed: without
them the sanitizer complains.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from mutation import markers, replace

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory):
    """sanitizer(ranks, steps, *edits): (exit code, stdout, stderr) of the protocol with these
    edits.
    """
    if shutil.which("setarch") is None:
        pytest.skip(
            "needs setarch (util-linux): ThreadSanitizer wants addresses that are not randomised"
        )
    folder = tmp_path_factory.mktemp("ring")

    def run(ranks, steps, *edits):
        (folder / "csrc/shm").mkdir(parents=True, exist_ok=True)
        (folder / "tests/proofs/shm").mkdir(parents=True, exist_ok=True)
        for name in ("ring.h", "ring.cpp"):
            text = (ROOT / "csrc/shm" / name).read_text()
            for edit in edits:
                text = edit.apply(text) if edit.markers <= markers(text) else text
            (folder / "csrc/shm" / name).write_text(text)
        shutil.copy(ROOT / "tests/proofs/shm/ring.cpp", folder / "tests/proofs/shm")
        sources = ["tests/proofs/shm/ring.cpp", "csrc/shm/ring.cpp"]
        command = [
            "g++",
            "-std=c++17",
            "-O1",
            "-g",
            "-fsanitize=thread",
            "-pthread",
            *sources,
            "-o",
            "ring",
        ]
        subprocess.run(command, cwd=folder, check=True, timeout=200)
        run = subprocess.run(
            ["setarch", "-R", "./ring", str(ranks), str(steps)],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=200,
        )
        return run.returncode, run.stdout, run.stderr

    return run


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_read_is_ordered(sanitizer, ranks):
    code, out, err = sanitizer(ranks, 600)
    assert code == 0 and out == "0 wrong\n" and "ThreadSanitizer" not in err, err[:3000]


@pytest.mark.parametrize(
    "edits",
    [
        [
            replace("ring.post", "seq_cst", "relaxed"),
            replace("ring.wake", r"\(own.*?\)\)", "(true)"),
        ],
        [replace("ring.arrived", "acquire", "relaxed")],
        # One slot: the next step's data over what is being read.
        [replace("ring.slot", r"\(step & 1\)", "0 * (step & 1)")],
        # Reads what is not there yet.
        [replace("ring.arrived", r">= step_", ">= step_ - 1")],
    ],
    ids=["posted without release", "seen without acquire", "one slot", "a step early"],
)
def test_what_is_taken_out_is_noticed(sanitizer, edits):
    code, out, err = sanitizer(3, 600, *edits)
    assert code != 0 and ("ThreadSanitizer: data race" in err or out != "0 wrong\n")
