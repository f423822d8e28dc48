"""Compiles the all-reduce kernels with ptxas, without a GPU, and checks the machine code.

Registers, stack, spills and opcodes are read, and must meet what `complaints` lists.
"""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import device_build

ARCHS = ("sm_80", "sm_90", "sm_100")
RANKS = (2, 4, 8)
DTYPES = {"float": "f", "__half": "6__half", "__nv_bfloat16": "13__nv_bfloat16"}
KERNELS = ("one_shot", "two_shot", "two_shot_multimem")
MAX_REGISTERS = 128  # 512 threads a block, 64 Ki registers an SM

NAME = re.compile(
    rf"9tpkernels\d+({'|'.join(KERNELS)})I({'|'.join(DTYPES.values())})Li(\d)ELb([01])E"
)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def instances(dtypes, ranks, norms=(False, True)) -> str:
    lines = ["#include <tpkernels/all_reduce.cuh>", "namespace tpkernels {"]
    for kernel in KERNELS:
        for dtype in dtypes:
            for count in ranks:
                for norm in norms:
                    lines.append(
                        f"template __global__ void {kernel}<{dtype}, {count}, {str(norm).lower()}>"
                        f"(Arguments<{dtype}>);"
                    )
    return "\n".join([*lines, "}", ""])


def compile_kernels(arch: str, source: str, headers: Path, folder: Path) -> list[dict]:
    """A dict for each kernel: name, arch, kernel, ranks, norm, regs, stack, spill (bytes), smem,
    instructions (opcodes in order), opcodes, multimem (the PTX instructions: their SASS does not
    show the scope).
    """
    file, ptx, cubin = (folder / f"instances-{arch}.{kind}" for kind in ("cu", "ptx", "cubin"))
    file.write_text(source)
    target = f"-arch={arch}"
    include = ["-I", headers.parent]
    device_build.run([nvcc(), "-std=c++17", "-O3", target, "-ptx", *include, file, "-o", ptx])
    log = device_build.run([nvcc(), target, "-cubin", "-Xptxas", "-v", ptx, "-o", cubin]).stderr
    virtual = dict(re.findall(r"\.entry (\w+)\((.*?)^}", ptx.read_text(), re.S | re.M))
    sass = device_build.run([device_build.toolkit("bin/nvdisasm"), "-c", cubin]).stdout
    bodies = {part.split(",", 1)[0]: part for part in sass.split(".section\t.text.")[1:]}
    kernels = []
    for entry in log.split("Compiling entry function '")[1:]:
        mangled = entry.split("'", 1)[0]
        kernels.append(_read_kernel(arch, entry, bodies[mangled], virtual[mangled]))
    return kernels


def _read_kernel(arch: str, entry: str, body: str, virtual: str) -> dict:
    """One kernel's dict from ptxas' entry in the log, its machine code and its PTX."""
    spelling = {mangled: dtype for dtype, mangled in DTYPES.items()}
    kernel, dtype, ranks, norm = NAME.search(entry.split("'", 1)[0]).groups()
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
    ).groups()
    smem = re.search(r"(\d+) bytes smem", entry)
    opcode = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)"
    instructions = re.findall(opcode, body)
    return dict(
        name=f"{kernel}<{spelling[dtype]}, {ranks}{', norm' if norm == '1' else ''}>",
        arch=arch,
        kernel=kernel,
        ranks=int(ranks),
        norm=norm == "1",
        regs=int(re.search(r"Used (\d+) registers", entry)[1]),
        stack=int(stack),
        spill=int(stores) + int(loads),
        smem=int(smem[1]) if smem else 0,
        instructions=instructions,
        opcodes=Counter(instructions),
        multimem=re.findall(r"multimem\.\S+", virtual),
    )


def cuda_resources(arch: str, dtypes=tuple(DTYPES), ranks=RANKS) -> list[dict]:
    """compile_kernels for these dtypes and numbers of ranks. Needs nvcc."""
    source = instances(dtypes, ranks)

    def make(path):
        folder = Path(f"{path}.files")
        folder.mkdir(exist_ok=True)
        path.write_text(json.dumps(compile_kernels(arch, source, device_build.HEADERS, folder)))
        shutil.rmtree(folder)

    headers = sorted(device_build.HEADERS.glob("*.cuh"))
    return json.loads(
        device_build.kept("json", (arch, source), [Path(__file__), *headers], make).read_text()
    )


Check = tuple[bool, str]  # passed, the complaint otherwise


def complaints(kernel: dict) -> list[str]:
    """Everything that is wrong with a kernel's machine code."""
    checks = [*_memory_checks(kernel), *_flag_checks(kernel)]
    if kernel["kernel"] != "two_shot_multimem":
        checks.append(_load_order_check(kernel))
    elif kernel["arch"] != "sm_80":
        checks += _multicast_checks(kernel)
    return [f"{kernel['arch']} {kernel['name']}: {message}" for good, message in checks if not good]


def _any_opcode(pattern: str, code: list[str]) -> bool:
    return any(re.fullmatch(pattern, op) for op in code)


def _memory_checks(kernel: dict) -> list[Check]:
    code = kernel["instructions"]
    spilled = f"stack {kernel['stack']}, spilled {kernel['spill']} bytes"
    return [
        (kernel["stack"] == 0 and kernel["spill"] == 0, spilled),
        (not any(op.startswith(("LDL", "STL")) for op in code), "local memory"),
        (kernel["regs"] <= MAX_REGISTERS, f"{kernel['regs']} registers"),
        (_any_opcode(r"LDG?\.E\.128(\.CONSTANT)?", code), "no 16-byte load"),
        (_any_opcode(r"STG?\.E\.128", code), "no 16-byte store"),
        # The non-coherent path would be free to return a slot's data of an earlier launch.
        (not any("CONSTANT" in op for op in code), "loads through the non-coherent path"),
    ]


def _flag_checks(kernel: dict) -> list[Check]:
    """A flag is a store behind a fence of the system, or a load followed by dropping L1."""
    code = kernel["instructions"]
    barriers = 1 if kernel["kernel"] == "one_shot" else 2
    memory = [op for op in code if re.match(r"LD|ST|MEMBAR|CCTL|BAR|RED|ATOM", op)]
    stores = [i for i, op in enumerate(memory) if re.fullmatch(r"STG?\.E\.64\.STRONG\.SYS", op)]
    loads = [i for i, op in enumerate(memory) if re.fullmatch(r"LDG?\.E\.64\.STRONG\.SYS", op)]
    released = all(re.fullmatch(r"MEMBAR\.\w+\.SYS", memory[i - 1]) for i in stores)
    acquired = all(memory[i + 1] == "CCTL.IVALL" for i in loads)
    narrower = any(re.search(r"STRONG\.(GPU|SM|CTA)", op) for op in code)
    return [
        (
            len(stores) == barriers and len(loads) == barriers,
            f"{len(stores)} flag stores and {len(loads)} flag loads of the system's scope",
        ),
        (released, "a flag is stored without a release"),
        (acquired, "a flag is loaded without an acquire"),
        (not narrower, "an access of a narrower scope than the system's"),
    ]


def _multicast_checks(kernel: dict) -> list[Check]:
    code, multimem = kernel["instructions"], kernel["multimem"]
    of_system = len(multimem) == 2 and all(".sys." in op for op in multimem)
    # HPADD, high precision, is sm_100's accumulation in fp32.
    in_fp32 = any(re.match(r"LDGMC\..*(F32|HPADD)", op) for op in code)
    to_all = _any_opcode(r"STG?\.E\.128\.STRONG\.SYS", code)
    return [
        (of_system, f"multicast accesses {multimem}"),
        (in_fp32, "no load that the switch reduces in fp32"),
        (to_all, "no store to all ranks of the system's scope"),
    ]


def _load_order_check(kernel: dict) -> Check:
    in_flight = most = 0
    for op in kernel["instructions"]:
        in_flight = 0 if op.startswith("FADD") else in_flight + (op == "LD.E.128")
        most = max(most, in_flight)
    ranks = kernel["ranks"]
    return (
        most >= ranks,
        f"only {most} of {ranks} ranks' parts are loaded before the first is added",
    )
