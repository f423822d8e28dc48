"""The shm transport's protocol under ThreadSanitizer, and that its orderings are needed: without them the sanitizer complains."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POST = "own.posted.store(step_, std::memory_order_seq_cst);"
ARRIVED = "return peer.posted.load(std::memory_order_acquire) >= step_;"
HALF = "(step & 1) * half_bytes_"


@pytest.fixture(scope="module")
def sanitizer(tmp_path_factory):
    """sanitizer(ranks, steps, old, new, ...): what the protocol does, with these texts replaced."""
    if shutil.which("setarch") is None:
        pytest.skip(
            "needs setarch (util-linux): ThreadSanitizer wants addresses that are not randomised"
        )
    folder = tmp_path_factory.mktemp("ring")

    def run(ranks, steps, *edits):
        (folder / "csrc/shm").mkdir(parents=True, exist_ok=True)
        (folder / "tests/shm").mkdir(parents=True, exist_ok=True)
        for name in ("ring.h", "ring.cpp"):
            text = (ROOT / "csrc/shm" / name).read_text()
            for old, new in zip(edits[::2], edits[1::2], strict=True):
                text = text.replace(old, new)
            (folder / "csrc/shm" / name).write_text(text)
        shutil.copy(ROOT / "tests/shm/ring.cpp", folder / "tests/shm")
        sources = ["tests/shm/ring.cpp", "csrc/shm/ring.cpp"]
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
        (
            POST,
            POST.replace("seq_cst", "relaxed"),
            "own.sleepers.load(std::memory_order_seq_cst)",
            "true",
        ),
        (ARRIVED, ARRIVED.replace("acquire", "relaxed")),
        (HALF, "0 * (step & 1)"),  # one half: the next step's data over what is being read
        (ARRIVED, ARRIVED.replace(">= step_", ">= step_ - 1")),  # reads what is not there yet
    ],
    ids=["posted without release", "seen without acquire", "one half", "a step early"],
)
def test_what_is_taken_out_is_noticed(sanitizer, edits):
    code, out, err = sanitizer(3, 600, *edits)
    assert code != 0 and ("ThreadSanitizer: data race" in err or out != "0 wrong\n")
