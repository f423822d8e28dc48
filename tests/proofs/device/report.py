"""`python tests/proofs/device/report.py --out docs/kernels.md`: each kernel's use of each chip,
between markers of a Markdown file.

`--check` writes nothing and exits 1 if the tables in the file are not what it would write. Nothing
in them depends on the machine: only on the kernels, on Triton's version and on nvcc's, which they
state. Without an nvcc, or with another one, the table of the CUDA kernels is left as it is, since
another compiler takes other registers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parents[2] / "docs/kernels.md"
sys.path[:0] = [
    str(HERE.parents[2]),
    str(HERE),
]  # the checkout's tpkernels, and this folder's modules, wherever it is started

from aot import Resources, Spec, Traffic, compile_all, faults, measure_all  # noqa: E402
from chips import CHIPS  # noqa: E402
from specs import load  # noqa: E402

CUDA_THREADS = 512  # the most that the kernels are launched with
COLUMNS = (
    "kernel",
    "configuration",
    "chip",
    "registers",
    "spills",
    "shared memory",
    "occupancy",
    "access or unit",
)
COLUMNS += ("bytes / element", "scratch", "least")


def markers(name: str) -> tuple[str, str]:
    return (
        f"<!-- {name} begin: written by tests/proofs/device/report.py -->",
        f"<!-- {name} end -->",
    )


def replace(text: str, name: str, table: str) -> str:
    """text with what is between the markers replaced by the table; both markers must be there,
    once.
    """
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the file needs one line {begin!r} and, after it, one line {end!r}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"


def between(text: str, name: str) -> str:
    begin, end = markers(name)
    return text.split(begin)[1].split(end)[0] if begin in text and end in text else ""


def row(kernel: str, configuration: str, made: Resources, traffic=None) -> tuple[str, ...]:
    loads, stores = (max(made.bytes_by_width(kind), default=0) for kind in ("load", "store"))
    chip = CHIPS[made.chip]
    per_element = [""] * 3
    if traffic:
        per_element = [
            f"{count / traffic.elements:.3g}"
            for count in (traffic.moved, traffic.scratch, traffic.least)
        ]
    return (
        kernel,
        configuration,
        made.chip,
        str(made.registers),
        f"{made.spills} B",
        f"{made.shared} of {chip.shared_of_block} B",
        f"{made.occupancy:.0%}",
        ", ".join(made.tensor_cores) or f"{8 * loads}-bit loads, {8 * stores}-bit stores",
        *per_element,
    )


def markdown(rows: list[tuple[str, ...]]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def configuration(spec: Spec) -> str:
    blocks = ", ".join(f"{name}={value}" for name, value in spec.constexprs.items())
    return f"{spec.name}: {blocks}, {spec.num_warps} warps, {spec.num_stages} stages"


def triton_table(
    specs: list[Spec], made: dict[tuple[str, str], Resources], traffic: dict[str, Traffic]
) -> str:
    """made and traffic: compile_all's and measure_all's, of the specs."""
    rows = [
        row(
            f"`{spec.kernel.split(':')[1]}`",
            configuration(spec),
            made[spec.name, chip],
            traffic.get(spec.op),
        )
        for spec in specs
        for chip in spec.chips
    ]
    return f"Triton {version('triton')}.\n\n{markdown(rows)}"


def nvcc_version() -> str | None:
    """ "13.0.88" of the nvcc that CUDA_HOME or PATH names, else None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = next(
        (
            path
            for path in (f"{home}/bin/nvcc", shutil.which("nvcc"))
            if path and os.path.exists(path)
        ),
        None,
    )
    if nvcc is None:
        return None
    said = subprocess.run(
        [nvcc, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return re.search(r"\bV([\d.]+)", said)[1]


def cuda_table(nvcc: str) -> str:
    """The bfloat16 instances, which stand for those of the other 16-bit type and, with half the
    elements a load, of float32.
    """
    import sass

    rows = []
    for arch in sass.ARCHS:
        for made in sass.cuda_resources(arch, dtypes=("__nv_bfloat16",)):
            resources = Resources(
                arch,
                CUDA_THREADS,
                made["regs"],
                made["spill"],
                made["stack"],
                made["smem"],
                opcodes=made["opcodes"],
            )
            rows.append(
                row(f"`{made['kernel']}`", f"`{made['name']}`, {CUDA_THREADS} threads", resources)
            )
    return f"nvcc {nvcc}.\n\n{markdown(rows)}"


def renew(text: str, triton: str) -> str:
    """The file's text with its tables as they should be. triton: triton_table's."""
    text = replace(text, "triton", triton)
    if importlib.util.find_spec("sass") is None:
        return text
    nvcc, written = nvcc_version(), re.search(r"nvcc ([\d.]+)\.\n", between(text, "cuda"))
    if nvcc is None or (written and written[1] != nvcc):
        print(
            f"the table of the CUDA kernels is nvcc {written and written[1]}'s and is left "
            f"as it is: here is {nvcc or 'none'}",
            file=sys.stderr,
        )
        return text
    return replace(text, "cuda", cuda_table(nvcc))


def save(path: Path, text: str) -> None:
    """Written beside, then renamed."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as beside:
        beside.write(text)
    os.chmod(beside.name, path.stat().st_mode)
    os.replace(beside.name, path)


def keep(name: str, table: str, path: Path = DOCUMENT) -> bool:
    """Puts the table into the document, and returns True if it was there already."""
    text = path.read_text()
    if between(text, name).strip() == table:
        return True
    save(path, replace(text, name, table))
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="the Markdown file, which has the markers"
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, exit 1 if the file is not current"
    )
    options = parser.parse_args()
    text = options.out.read_text()
    specs = load()
    made = compile_all(specs)
    if wrong := [
        f"{spec.name} {chip}: {fault}"
        for spec in specs
        for chip in spec.chips
        for fault in faults(spec, made[spec.name, chip])
    ]:
        print("\n".join(wrong), file=sys.stderr)
        return 1
    renewed = renew(text, triton_table(specs, made, measure_all(specs)))
    if renewed == text:
        return 0
    if options.check:
        print(
            f"{options.out} is not current: "
            f"`python tests/proofs/device/report.py --out {options.out}` writes it anew",
            file=sys.stderr,
        )
        return 1
    save(options.out, renewed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
