"""Helpers of the planner's tests: the GPUs' names, and the `tpkernels plan` command."""

import os
import subprocess
import sys

GPUS = ("a100-40", "a100-80", "h100", "h200", "b200", "l40s", "v100", "cpu")


def run_plan(*args, **environment):
    """Run `tpkernels plan` in a process of its own, in a wide terminal."""
    return subprocess.run(
        [sys.executable, "-c", "from tpkernels_command import main; main()", "plan", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "220", **environment},
    )
