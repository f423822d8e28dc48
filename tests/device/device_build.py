"""Builds the device code for the CPU: csrc/include/tpkernels/*.cuh through g++ and simt/, as a library or, with a main, a program."""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parent.parent / "csrc" / "include" / "tpkernels"
CACHE = Path(tempfile.gettempdir()) / f"tpkernels-device-{os.getuid()}"
SANITIZERS = {None: [], "thread": ["-fsanitize=thread", "-DSIMT_TSAN"], "address": ["-fsanitize=address,undefined", "-DSIMT_ASAN"]}


def cuda_headers() -> Path:
    """Where cuda_bf16.h is: triton's wheel brings it."""
    return Path(importlib.util.find_spec("triton").submodule_search_locations[0]) / "backends" / "nvidia" / "include"


def sources() -> list[Path]:
    return sorted([*HEADERS.glob("*.cuh"), *HERE.glob("*.h"), *HERE.glob("*.cpp"), *(p for p in (HERE / "simt").rglob("*") if p.is_file())])


def run_compiler(command: list) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300)
    if result.returncode:
        raise RuntimeError(f"{' '.join(str(part) for part in command)}\n{result.stderr[-4000:]}")


def build(*files: str, sanitizer: str | None = None, defines: tuple[str, ...] = (), headers: Path = HEADERS) -> Path:
    """A shared library of `files`, or a program where one of them is check.cpp; kept under a hash of all that goes into it.

    headers: another copy of the .cuh files, changed (a mutant).
    """
    key = hashlib.sha256(repr((files, sanitizer, defines)).encode())
    for source in [*sources(), *sorted(headers.glob("*.cuh"))]:
        key.update(source.read_bytes())
    program = "check.cpp" in files
    CACHE.mkdir(exist_ok=True)
    result = CACHE / f"{key.hexdigest()[:20]}{'' if program else '.so'}"
    with open(f"{result}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if result.exists():
            return result
        flags = ["-O1", "-g1", "-std=c++17", "-fPIC", *SANITIZERS[sanitizer], *(f"-D{define}" for define in defines)]
        includes = ["-I", HERE / "simt", "-I", headers.parent, "-isystem", cuda_headers()]
        partial = Path(f"{result}.{os.getpid()}")
        # The scheduler is built without the sanitizer: it must stay out of its sight.
        simt = Path(f"{partial}.o")
        run_compiler(["g++", "-c", *(f for f in flags if "sanitize" not in f), *includes, HERE / "simt" / "simt.cpp", "-o", simt])
        kind = [] if program else ["-shared"]
        run_compiler(["g++", *kind, *flags, *includes, *(HERE / f for f in files), simt, "-o", partial])
        simt.unlink()
        partial.rename(result)
    return result
