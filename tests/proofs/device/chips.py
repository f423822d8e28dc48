"""Limits of the chips that kernels are compiled for, and the occupancy that follows from them.

Sources. NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities", table of technical
specifications per compute capability; the allocation rules are those of the toolkit's
cuda_occupancy.h, against which test_chips.py holds `occupancy`. AMD: "AMD Instinct MI300 CDNA3
Instruction Set Architecture", register and LDS allocation, and LLVM's AMDGPU usage guide.
"""

from __future__ import annotations

from dataclasses import dataclass


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Chip:
    target: tuple[str, object, int]  # Triton's backend, architecture, threads of a warp
    # A multiprocessor's partition (a quarter of it) has so many warps' registers of 32 or 64 lanes.
    registers: int
    register_unit: int  # a warp's registers are allocated in multiples of this many per lane
    registers_of_thread: int
    shared: int  # bytes of a multiprocessor
    shared_of_block: int  # bytes that a block may have of it
    shared_reserved: int  # bytes that the system takes for each block
    shared_unit: int
    warps: int  # of a multiprocessor
    blocks: int
    tensor_memory: int = 0  # columns of a multiprocessor

    def occupancy(self, threads: int, registers: int, shared: int, tensor_memory: int = 0) -> float:
        """Resident warps over the most there can be, for blocks of `threads` threads with
        `registers` registers each, `shared` bytes and `tensor_memory` columns. 0 if not one block
        fits.
        """
        if shared > self.shared_of_block or registers > self.registers_of_thread:
            return 0.0
        warps = -(-threads // self.target[2])
        of_partition = self.registers // _up(max(registers, 1), self.register_unit)
        limits = [self.blocks, self.warps // warps, 4 * of_partition // warps]
        if taken := _up(shared + self.shared_reserved, self.shared_unit):
            limits.append(self.shared // taken)
        if tensor_memory:
            limits.append(self.tensor_memory // tensor_memory)
        return min(limits) * warps / self.warps

    def static_shared(self, reported: int) -> int:
        """The kernel's own part of what cuobjdump reports, which from sm_90 on includes the
        system's.
        """
        return (
            reported - self.shared_reserved
            if self.target[1] != 80 and reported >= self.shared_reserved
            else reported
        )


def _nvidia(arch: int, shared_kib: int, tensor_memory: int = 0) -> Chip:
    # 64 K registers, in quarters of 16 K: 512 for each lane of a warp.
    return Chip(
        ("cuda", arch, 32),
        512,
        8,
        255,
        shared_kib << 10,
        (shared_kib - 1) << 10,
        1 << 10,
        128,
        64,
        32,
        tensor_memory,
    )


CHIPS = {
    "sm_80": _nvidia(80, 164),  # A100
    "sm_90": _nvidia(90, 228),  # H100
    "sm_100": _nvidia(100, 228, tensor_memory=512),  # B200
    # MI300X: 512 registers (VGPRs and AGPRs) for each lane of a SIMD, 8 waves on each of 4 SIMDs,
    # 64 KiB of LDS.
    "gfx942": Chip(("hip", "gfx942", 64), 512, 8, 512, 64 << 10, 64 << 10, 0, 512, 32, 16),
}
