"""The occupancy table against the vendors' own arithmetic."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
from aot import Spec
from chips import CHIPS
from workers import pool

# cuda_occupancy.h is NVIDIA's calculator, host code alone; the device's limits are given to it as
# cudaGetDeviceProperties would.
CALCULATOR = """
#include <cstdio>
#include <cuda_runtime.h>
#include <cuda_occupancy.h>
int main() {
  int major, shared, threads, registers, taken;
  while (std::scanf("%d %d %d %d %d", &major, &shared, &threads, &registers, &taken) == 5) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = 0;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 2048;
    device.warpSize = 32, device.numSms = 100;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.sharedMemPerMultiprocessor = shared, device.sharedMemPerBlock = 49152;
    device.reservedSharedMemPerBlock = 1024, device.sharedMemPerBlockOptin = shared - 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
    kernel.numBlockBarriers = 1, kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared - 1024;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    int error = cudaOccMaxActiveBlocksPerMultiprocessor(
        &result, &device, &kernel, &state, threads, taken);
    std::printf("%d\\n", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100"])
def test_nvidia(tmp_path, name):
    from importlib.util import find_spec

    # Triton's wheel carries the toolkit's headers.
    include = Path(find_spec("triton").origin).parent / "backends/nvidia/include"
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    command = [
        "g++",
        "-w",
        "-I",
        include,
        tmp_path / "calculator.cpp",
        "-o",
        tmp_path / "calculator",
    ]
    subprocess.run(command, check=True, timeout=120)
    chip = CHIPS[name]
    shared = (
        0,
        1,
        127,
        1024,
        16384,
        33000,
        65536,
        98304,
        chip.shared_of_block - 1,
        chip.shared_of_block,
    )
    cases = list(
        itertools.product((32, 64, 96, 128, 256, 384, 512, 768, 1024), range(8, 256), shared)
    )
    lines = "".join(
        f"{name[3:-1]} {chip.shared} {threads} {registers} {taken}\n"
        for threads, registers, taken in cases
    )
    said = subprocess.run(
        [tmp_path / "calculator"],
        input=lines,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    wrong = []
    for (threads, registers, taken), blocks in zip(cases, map(int, said.split()), strict=True):
        if chip.occupancy(threads, registers, taken) != blocks * (threads // 32) / 64:
            wrong.append((threads, registers, taken, blocks))
    assert wrong == []
    assert chip.occupancy(128, 32, chip.shared_of_block + 1) == 0


def test_tensor_memory_bounds_the_blocks():
    chip = CHIPS["sm_100"]
    assert chip.occupancy(128, 32, 0) == 1
    assert chip.occupancy(128, 32, 0, tensor_memory=256) == 2 * 4 / 64


def _llvm(spec: Spec) -> tuple[int, int]:
    """(registers, waves per SIMD) as LLVM's comment in the assembly has them."""
    import importlib
    import re

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module("samples"), spec.kernel.split(":")[1])
    signature = {name: spec.signature.get(name, "constexpr") for name in kernel.arg_names}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in spec.constexprs.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs)
    text = triton.compile(
        source, target=GPUTarget(*CHIPS["gfx942"].target), options={"num_warps": spec.num_warps}
    ).asm["amdgcn"]
    return int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), int(
        re.search(r"; Occupancy: (\d+)", text)[1]
    )


def test_amd():
    """Against LLVM, at several register counts; it does not know the dynamic LDS, of which these
    kernels have little.
    """
    specs = [
        Spec("", "samples:softmax", dict(x="*bf16", y="*bf16"), dict(N=n), num_warps=1)
        for n in (256, 2048, 4096, 8192)
    ]
    with pool(2) as workers:
        found = [job.result(timeout=300) for job in [workers.submit(_llvm, spec) for spec in specs]]
    assert len(set(found)) > 2, found
    for registers, waves in found:
        assert CHIPS["gfx942"].occupancy(256, registers, 0) == waves / 8, (registers, waves)
