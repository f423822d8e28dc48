"""Runs tests/kernels in a process of its own.

Triton must be told to interpret before it is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_triton_kernels_by_the_interpreter(record_property):
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "--tb=short",
            "-W",
            "ignore::RuntimeWarning",
            TESTS / "kernels",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    record_property("passed", int(passed[1]))
    print(f"{passed[1]} tests of the kernels passed")
