"""The CUDA kernels' machine code: sass.py. Needs nvcc, no GPU."""

import pytest
import report
import sass

pytestmark = pytest.mark.skipif(
    sass.nvcc() is None, reason="no nvcc: neither in CUDA_HOME, /usr/local/cuda nor PATH"
)


@pytest.mark.parametrize("arch", sass.ARCHS)
def test_machine_code(arch):
    kernels = sass.cuda_resources(arch)
    assert len(kernels) == len(sass.KERNELS) * len(sass.DTYPES) * len(sass.RANKS) * 2
    assert not [complaint for kernel in kernels for complaint in sass.complaints(kernel)]
    for kernel in kernels:
        print(
            f"{arch} {kernel['name']:45} {kernel['regs']:3} registers, "
            f"{kernel['smem']:3} B shared, {len(kernel['instructions'])} instructions"
        )


def test_documented():
    nvcc = report.nvcc_version()
    table = report.cuda_table(nvcc)
    print(f"\n{table}")
    before = report.between(report.DOCUMENT.read_text(), "cuda")
    if "nvcc " in before and f"nvcc {nvcc}.\n" not in before:
        pytest.skip("docs/kernels.md was written with another nvcc")
    assert report.keep("cuda", table), (
        "docs/kernels.md was not current and has been written anew: commit it"
    )
