"""Compiles Triton kernels for chips that are not here, and reads what the compiler made of them.

No GPU, driver or CUDA toolkit is needed: ptxas (ptxas-blackwell from sm_100 on), cuobjdump and
nvdisasm come with Triton.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from chips import CHIPS
from workers import pool

# Neither this module nor a Spec imports Triton: whether it compiles or interprets is settled there,
# at import. workers.py does that afresh.


@dataclass(frozen=True)
class Spec:
    """One kernel in one configuration, as the code that launches it would compile it."""

    name: str  # of the configuration, unique
    kernel: str  # "module:function", a triton.jit function
    signature: dict[
        str, str
    ]  # argument -> Triton type ("*bf16", "i32", "fp32", ...), constexprs left out
    constexprs: dict[str, object]  # a Triton type by its name
    num_warps: int = 4
    num_stages: int = 3
    # "memory": bound by memory, wants wide loads and stores and moves the least bytes; "memory,
    # read again": the same but for the bytes; "reduction": wants wide loads and moves the least
    # bytes; "gemm": wants tensor cores; "other"
    kind: str = "other"
    # Pointers aligned to 16 bytes and integers that are multiples of 16, for which
    # Triton specialises.
    divisible: tuple[str, ...] = ()
    chips: tuple[str, ...] = tuple(CHIPS)
    op: str = ""  # that launches this kernel, maybe among others
    case: str = ""  # runs the op for traffic.measure, which says what it is
    # Bytes, such as partial sums, that the op writes once and reads once between its kernels, at
    # the case's size
    scratch: int = 0


@dataclass
class Resources:
    """The resources that one kernel takes of one chip."""

    chip: str
    threads: int = 0  # of a block
    registers: int = 0  # of a thread
    spills: int = 0  # bytes that a thread stores to memory for want of registers
    local: int = 0  # bytes of a thread's stack: spills and arrays that are not in registers
    shared: int = 0  # bytes of a block, static and dynamic
    tensor_memory: int = 0  # columns of a block (sm_100)
    # It counts instructions by opcode, modifiers included.
    opcodes: dict[str, int] = field(default_factory=dict)
    float_atomics: bool = False
    error: str = ""  # of the compiler, if it made nothing

    @property
    def occupancy(self) -> float:
        """Resident warps of a multiprocessor over the most it holds; theoretical, given enough
        blocks.
        """
        return CHIPS[self.chip].occupancy(
            self.threads, self.registers, self.shared, self.tensor_memory
        )

    def bytes_by_width(self, kind: str) -> dict[int, int]:
        """Width in bytes of a thread's access -> static number of bytes; kind "load" or "store",
        global memory.
        """
        widths: dict[int, int] = {}
        for opcode, count in self.opcodes.items():
            if (found := access(opcode)) and found[0] == kind:
                widths[found[1]] = widths.get(found[1], 0) + found[1] * count
        return widths

    @property
    def tensor_cores(self) -> list[str]:
        """Kinds of tensor-core instructions: HMMA (sm_80), HGMMA (sm_90), UTC*MMA (sm_100), MFMA
        (gfx9).
        """
        found = (re.match(r"(?:UTC)?[HIQDO]G?MMA|v_mfma", opcode) for opcode in self.opcodes)
        return sorted({match[0].replace("v_mfma", "MFMA") for match in found if match})


@dataclass(frozen=True)
class Traffic:
    moved: int  # bytes that the kernels read and write of the op's inputs and outputs
    scratch: int  # bytes that they read and write of anything else
    least: int  # bytes if each element of an input is read once and each of an output written once
    elements: int  # of the storage of which most is touched

    @property
    def ratio(self) -> float:
        return self.moved / self.least


def access(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bytes a thread moves) of an instruction on global memory; bulk copies
    (TMA) count as 16 bytes.
    """
    name, *modifiers = opcode.split(".")
    if name in ("UTMALDG", "UBLKCP", "UTMASTG"):
        return ("store" if name == "UTMASTG" else "load"), 16
    if name in (
        "LDG",
        "STG",
        "LDGSTS",
        "LD",
        "ST",
        "LDGMC",
    ):  # generic ones too: CUDA code that was not told the address space
        bits = next(
            (int(m.lstrip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16)|64|128|256", m)),
            32,
        )
        return ("store" if name in ("STG", "ST") else "load"), bits // 8
    if match := re.fullmatch(r"(?:global|buffer|flat)_(load|store)_(\w+)", name):
        size = re.match(r"(?:lds_)?(dword(?:x(\d))?|[us]?(short|byte)|b(\d+))", match[2])
        if size is None:
            return None
        if size[4]:
            return match[1], int(size[4]) // 8
        return match[1], {"short": 2, "byte": 1}.get(size[3], 4 * int(size[2] or 1))
    return None


FLOAT_ATOMIC = re.compile(
    r"(ATOM|RED)[GS]?\.(\w+\.)*(BF16|F16|F32|F64)"
    r"|(global|buffer|flat)_atomic_\w*f(16|32|64)|ds_(pk_)?add_(rtn_)?b?f\d+"
)


WIDE = {"memory": ("load", "store"), "reduction": ("load",)}


def faults(spec: Spec, made: Resources) -> list[str]:
    """The gates' complaints."""
    if made.error:
        return [f"does not compile: {made.error}"]
    chip, found = CHIPS[made.chip], []
    if made.spills:
        found.append(f"spills {made.spills} bytes a thread")
    if made.local:
        found.append(f"keeps {made.local} bytes a thread in local memory")
    if made.shared > chip.shared_of_block:
        found.append(f"takes {made.shared} bytes of shared memory of {chip.shared_of_block}")
    if made.registers > chip.registers_of_thread:
        found.append(f"takes {made.registers} registers of {chip.registers_of_thread}")
    if made.float_atomics:
        found.append("adds floats atomically: the sum depends on the order of the blocks")
    for kind in WIDE.get(spec.kind.split(",")[0], ()):
        widths = made.bytes_by_width(kind)
        # Not all: a scalar of a row is 4 bytes, and what is in a loop counts here as what is not.
        if 2 * sum(count for width, count in widths.items() if width >= 16) <= sum(widths.values()):
            found.append(
                f"{kind}s too few of its bytes 16 at a time: "
                f"{dict(sorted(widths.items()))} (width: bytes)"
            )
    if spec.kind == "gemm" and not made.tensor_cores:
        found.append("does not use tensor cores")
    return found


def compile(spec: Spec, name: str) -> Resources:
    """Compiles for the chip `name`, in a process that does not interpret Triton."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip, (module, function) = CHIPS[name], spec.kernel.split(":")
    kernel = getattr(importlib.import_module(module), function)
    types = {kind.name: kind for kind in (tl.float32, tl.float64)}
    position = {argument: (index,) for index, argument in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature={
            argument: spec.signature.get(argument, "constexpr") for argument in kernel.arg_names
        },
        constexprs={
            position[argument]: types.get(value, value)
            for argument, value in spec.constexprs.items()
        },
        attrs={position[argument]: [["tt.divisibility", 16]] for argument in spec.divisible},
    )
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages}
    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = True
    try:
        with contextlib.redirect_stdout(log):
            made = triton.compile(source, target=GPUTarget(*chip.target), options=options)
    except Exception as error:
        return Resources(name, error=f"{type(error).__name__}: {error}".strip()[:2000])
    read = _read_nvidia if chip.target[0] == "cuda" else _read_amd
    resources = read(name, made, log.getvalue())
    # The compiler may turn a float atomic into a loop of compare-and-swap: what the source asked
    # for counts too.
    asked = re.search(r"atomic_rmw fadd", made.asm["ttir"]) is not None
    resources.float_atomics = asked or any(map(FLOAT_ATOMIC.match, resources.opcodes))
    return resources


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Reads a cubin by `cuobjdump --dump-resource-usage` and `nvdisasm -c`."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = (
            [tools / "cuobjdump", "--dump-resource-usage", file.name],
            [tools / "nvdisasm", "-c", file.name],
        )
        usage, sass = (
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
            for command in commands
        )
    return usage, sass


def count_sass(sass: str) -> dict[str, int]:
    """Instructions by opcode with its modifiers, of nvdisasm's listing."""
    return _count(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.M))


def _read_nvidia(name: str, made, log: str) -> Resources:
    usage, sass = disassemble(made.asm["cubin"])
    taken = {
        key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)
    }
    metadata, chip = made.metadata, CHIPS[name]
    return Resources(
        name,
        threads=int(
            re.search(r"\.reqntid (\d+)", made.asm["ptx"])[1]
        ),  # more than 32 num_warps where Triton specialises warps
        registers=taken["REG"],
        spills=sum(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        local=taken["STACK"] + taken["LOCAL"],
        shared=metadata.shared + chip.static_shared(taken["SHARED"]),
        tensor_memory=metadata.tmem_size or 0,
        opcodes=count_sass(sass),
    )


def _read_amd(name: str, made, log: str) -> Resources:
    text = made.asm["amdgcn"]
    value = {key: int(number) for key, number in re.findall(r"^\s+\.(\w+):\s+(\d+)$", text, re.M)}
    return Resources(
        name,
        threads=64 * made.metadata.num_warps,
        registers=value["vgpr_count"],  # accumulation registers included
        spills=4 * (value["vgpr_spill_count"] + value["sgpr_spill_count"]),
        local=value["private_segment_fixed_size"],
        shared=made.metadata.shared + value["group_segment_fixed_size"],
        opcodes=_count(re.findall(r"^\t([a-z]+_\w+)", text, re.M)),
    )


def _count(opcodes: list[str]) -> dict[str, int]:
    return {opcode: opcodes.count(opcode) for opcode in sorted(set(opcodes))}


def compile_all(specs: list[Spec], processes: int = 2) -> dict[tuple[str, str], Resources]:
    """(spec's name, chip) -> Resources, each compiled anew in a clean process."""
    names = [spec.name for spec in specs]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"specs of the same name: {repeated}")
    with pool(processes) as workers:
        jobs = {
            (spec.name, chip): workers.submit(compile, spec, chip)
            for spec in specs
            for chip in spec.chips
        }
        return {key: job.result(timeout=600) for key, job in jobs.items()}


def measure_all(specs: list[Spec], processes: int = 2) -> dict[str, Traffic]:
    """op -> Traffic, for the specs that have a case."""
    with pool(processes, interpret=True) as workers:
        jobs = {
            op: workers.submit(_measure, case, op)
            for op, case in {spec.op: spec.case for spec in specs if spec.case}.items()
        }
        return {op: job.result(timeout=600) for op, job in jobs.items()}


def _measure(case: str, op: str) -> Traffic:
    import traffic

    return traffic.measure(case, op)
