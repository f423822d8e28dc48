"""The CUDA kernels under ThreadSanitizer and AddressSanitizer: races inside a block, between
blocks, between ranks, between launches.
"""

import device_build
import pytest


@pytest.mark.parametrize("sanitizer", ("thread", "address"))
def test_clean(sanitizer, tmp_path):
    program = tmp_path / "check"
    device_build.check_program(program, sanitizer)
    status, said = device_build.run_check(program, seeds=40, timeout=300)
    assert status == 0 and said.startswith("right\n"), said[-4000:]
