"""The CPU kernels on the lower instruction sets of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = sorted((Path(__file__).parents[1] / "unit").glob("test_cpu_*.py"))
CAPABILITIES = ["default", "avx2", "avx512"]
CAPABILITY = torch.backends.cpu.get_cpu_capability().lower()


@pytest.mark.parametrize("capability", CAPABILITIES[: CAPABILITIES.index(CAPABILITY)])
def test_lower_instruction_sets(capability):
    assert len(TESTS) > 5
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not eager", *TESTS]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:]
