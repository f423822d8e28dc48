"""Builds the device code for the CPU: csrc/include/tpkernels/*.cuh through g++ and simt/.

Builds are kept under a hash of their sources.
"""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parents[2] / "csrc" / "include" / "tpkernels"
CACHE = HERE.parents[2] / "build" / "device"
SANITIZERS = {
    None: [],
    "thread": ["-fsanitize=thread", "-DSIMT_TSAN"],
    "address": ["-fsanitize=address,alignment", "-DSIMT_ASAN"],
}
# check.cpp runs these; all the rest is for the library that Python loads.
CHECK_DEFINES = ("TEST_RANKS=3", "TEST_TYPES=float, __nv_bfloat16")


def toolkit(path: str) -> Path:
    """A file of the CUDA toolkit: from triton's wheel, which has the headers and the disassembler,
    or from CUDA_HOME.
    """
    triton = importlib.util.find_spec("triton")
    roots = [Path(triton.submodule_search_locations[0]) / "backends" / "nvidia"] if triton else []
    roots.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")))
    for root in roots:
        if (root / path).exists():
            return root / path
    raise FileNotFoundError(
        f"no {path} in {', '.join(map(str, roots))}: install triton, or set CUDA_HOME"
    )


def run(command: list) -> subprocess.CompletedProcess:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )
    if result.returncode:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{result.stderr[-4000:]}")
    return result


def kept(kind: str, inputs: object, files: list[Path], make: Callable[[Path], None]) -> Path:
    """make(path), unless that was done before with the same inputs and contents of files.

    Safe against others that do the same.
    """
    key = hashlib.sha256(repr(inputs).encode())
    for file in files:
        key.update(file.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{key.hexdigest()[:20]}.{kind}"
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = Path(f"{path}.partial")
            make(partial)
            partial.rename(path)
    return path


def compile(
    output: Path, inputs: list[Path], sanitizer: str | None, *options: str, headers: Path = HEADERS
) -> None:
    flags = ["-O1", "-g1", "-std=c++17", "-fPIC", *SANITIZERS[sanitizer], *options]
    includes = [
        "-I",
        HERE / "simt",
        "-I",
        headers.parent,
        "-isystem",
        toolkit("include/cuda_bf16.h").parent,
    ]
    run(["g++", *flags, *includes, *inputs, "-o", output])


def objects(sanitizer: str | None) -> list[Path]:
    """The objects that do not depend on the device code: check.cpp, and the scheduler, which the
    sanitizer must not see.
    """

    def scheduler(path):
        unseen = [flag for flag in SANITIZERS[sanitizer] if flag.startswith("-D")]
        compile(path, [HERE / "simt" / "simt.cpp"], None, "-c", "-x", "c++", *unseen)

    def check(path):
        compile(path, [HERE / "check.cpp"], sanitizer, "-c")

    sources = [
        file
        for file in sorted(HERE.rglob("*"))
        if file.suffix in (".h", ".cpp") or file.parent.name == "nv"
    ]
    return [
        kept("o", ("scheduler", sanitizer), sources, scheduler),
        kept("o", ("check", sanitizer), sources, check),
    ]


def library() -> Path:
    """The harness, for ctypes."""
    sources = [HERE / "harness.cpp", objects(None)[0]]
    return kept(
        "so",
        (),
        [*sources, HERE / "harness.h", *sorted(HEADERS.glob("*.cuh"))],
        lambda path: compile(path, sources, None, "-shared"),
    )


def check_program(path: Path, sanitizer: str | None, headers: Path = HEADERS) -> None:
    """The harness and check.cpp, with the device code from `headers`."""
    compile(
        path,
        [HERE / "harness.cpp", *objects(sanitizer)],
        sanitizer,
        *(f"-D{define}" for define in CHECK_DEFINES),
        headers=headers,
    )


def run_check(program: Path, seeds: int, timeout: float) -> tuple[int, str]:
    """Exit status (check.cpp says what 1 and 2 mean, a sanitizer's is 66, -1: out of time) and what
    it said.
    """
    options = dict(
        TSAN_OPTIONS="halt_on_error=1 exitcode=66",
        ASAN_OPTIONS="exitcode=66",
        UBSAN_OPTIONS="halt_on_error=1 exitcode=66",
    )
    try:
        # ThreadSanitizer wants its address space where the kernel would put other things at random.
        command = ["setarch", "-R", str(program), str(seeds)]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **options}
        )
    except subprocess.TimeoutExpired:
        return -1, "out of time"
    return result.returncode, result.stdout + result.stderr
