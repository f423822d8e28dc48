"""Build tpkernels._C with ninja, against a CPU torch or a CUDA torch. No GPU is needed.

CUDA kernels are built where both torch and the toolkit (CUDA_HOME) have CUDA. The objects stay in
build/, so that the next build compiles only what changed and what includes it. `make setup`
installs the package editable; later `python setup.py build_ext --inplace` rebuilds the extension.

Environment:
    MAX_JOBS: Compilers that run at once. Default: ninja's choice, cores + 2.
    CXX: The C++ compiler. Default: g++. A ccache on PATH is used.
    CXXFLAGS, NVCCFLAGS: Flags to add; CXXFLAGS=-g gives debug information, which doubles the time.
    TORCH_CUDA_ARCH_LIST: CUDA chips. Default: 8.0;9.0;10.0, as far as the toolkit knows them.
    TPKERNELS_BUILD_CUDA: 0 leaves out the CUDA kernels, even with a CUDA torch.
    TPKERNELS_PRECOMPILED_HEADER: 0 lets every file parse torch's headers, as it must compile.
"""

import glob
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import (
    COMMON_NVCC_FLAGS,
    CUDA_HOME,
    CppExtension,
    CUDAExtension,
)

ROOT = Path(__file__).resolve().parent
KERNELS = sorted(glob.glob("csrc/cpu/kernels/*.cpp"))
NVCC = f"{CUDA_HOME}/bin/nvcc"
CUDA_CHIPS = "8.0;9.0;10.0"

# torch's CUDA version decides, never torch.cuda.is_available(): a builder has no GPU.
use_cuda = (
    torch.version.cuda is not None
    and CUDA_HOME is not None
    and os.environ.get("TPKERNELS_BUILD_CUDA") != "0"
)
if torch.version.cuda is not None and not use_cuda:
    print(
        "tpkernels: building without CUDA kernels: "
        f"torch is for CUDA {torch.version.cuda}, CUDA_HOME={CUDA_HOME}"
    )

# The CPU kernels are compiled once for each instruction set, as torch's own are, and chosen at run
# time.
x86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # for g++ 12's own avx512fintrin.h
INSTRUCTION_SETS = {"DEFAULT": []}
if x86:
    INSTRUCTION_SETS |= {"AVX2": AVX2, "AVX512": [*AVX2, *AVX512]}

# at::parallel_for is inlined. No OpenMP library is linked: torch has loaded its own, with its
# threads.
OPENMP = ["-fopenmp"] * (torch.backends.openmp.is_available() and platform.system() == "Linux")
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-DNDEBUG"),
    *("-fwrapv", "-fPIC", "-fvisibility=hidden", "-Wall"),
]
NVCC_FLAGS = ["-O3", "-DNDEBUG", "-std=c++20", "--extended-lambda", "-Xcompiler=-fPIC"]


def nvtx_headers() -> list[str]:
    """Find the nvidia-nvtx wheel's headers, for builds without a CUDA toolkit, which has its own.

    Without headers the profiler ranges are left out.
    """
    packages = importlib.util.find_spec("nvidia")
    folders = (packages and packages.submodule_search_locations) or []
    roots = [root for folder in folders for root in glob.glob(f"{folder}/*/include")]
    return [root for root in roots if os.path.exists(f"{root}/nvtx3/nvToolsExt.h")][:1]


def chip_flags() -> list[str]:
    """Translate TORCH_CUDA_ARCH_LIST, '8.0;9.0+PTX', into nvcc's flags.

    Raises:
        RuntimeError: The toolkit is of another CUDA release than torch.
    """
    version = subprocess.check_output([NVCC, "--version"], text=True)
    if f"release {torch.version.cuda.split('.')[0]}." not in version:
        raise RuntimeError(
            f"CUDA_HOME={CUDA_HOME} is not of CUDA {torch.version.cuda}, which torch is for: "
            "set CUDA_HOME to a toolkit of that CUDA, or TPKERNELS_BUILD_CUDA=0"
        )
    known = subprocess.check_output([NVCC, "--list-gpu-arch"], text=True).split()
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    flags = []
    for chip in (asked or CUDA_CHIPS).replace(" ", ";").split(";"):
        number, _, ptx = chip.partition("+")
        number = number.replace(".", "")
        if asked or f"compute_{number}" in known:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaFile:
    """A ninja file that compiles one extension's sources into a folder that is kept."""

    def __init__(self, folder: Path, include_dirs: list[str], macros: list[tuple]):
        self.folder = folder
        self.objects: list[str] = []
        defines = ["-D" + "=".join(filter(None, macro)) for macro in macros]
        flags = [*defines, f"-I{ROOT}/csrc/include"]
        for path in include_dirs:
            flags += ["-isystem", path]  # two words: nvcc takes no other form
        compiler = os.environ.get("CXX", "g++")
        if shutil.which("ccache"):
            compiler = f"CCACHE_SLOPPINESS=pch_defines,time_macros ccache {compiler}"
        cxx = [*CXX_FLAGS, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        self.lines = [f"cxx = {compiler} {shlex.join(cxx)}"]
        self.rule("cxx", "$cxx $flags -MMD -MF $out.d -c $in -o $out")
        if use_cuda:
            more = shlex.split(os.environ.get("NVCCFLAGS", ""))
            nvcc = [NVCC, *COMMON_NVCC_FLAGS, *NVCC_FLAGS, *chip_flags(), *flags, *more]
            self.lines.append(f"nvcc = {shlex.join(nvcc)}")
            self.rule("nvcc", "$nvcc -MD -MF $out.d -c $in -o $out")

    def rule(self, name: str, command: str) -> None:
        """Add a rule whose command also writes the included files to $out.d."""
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, sources: list[str], rule="cxx", flags="", folder="", header="") -> None:
        """Add one object per source, in `folder`; `header` is a file that must be built before."""
        for source in sources:
            self.objects.append(f"{folder}{source.removeprefix('csrc/')}.o")
            self.lines.append(f"build {self.objects[-1]}: {rule} {ROOT / source} | {header}")
            self.lines.append(f"  flags = {flags}")

    def precompile(self, header: Path, flags: str) -> str:
        """Add a precompiled header; return the flags of the sources that use it."""
        self.lines.append(f"build {header.name}.gch: cxx {header}")
        self.lines.append(f"  flags = {flags} -x c++-header")
        return f"{flags} -Winvalid-pch -include {self.folder / header.name}"

    def build(self) -> list[str]:
        """Run ninja; return the objects' paths."""
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
        subprocess.check_call([sys.executable, "-m", "ninja", "-C", self.folder, *jobs])
        return [str(self.folder / name) for name in self.objects]


class BuildKernels(build_ext):
    """Compile with ninja, then link as setuptools does."""

    def build_extension(self, extension):
        """Build the extension; called by setuptools."""
        folder = ROOT / "build" / f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        include_dirs = [*extension.include_dirs, *self.include_dirs]
        ninja = NinjaFile(folder, include_dirs, extension.define_macros)

        flags, header = " ".join(OPENMP), ""
        if os.environ.get("TPKERNELS_PRECOMPILED_HEADER") != "0":
            flags, header = (
                ninja.precompile(ROOT / "csrc/precompiled.h", flags),
                "precompiled.h.gch",
            )
        cpp = [source for source in extension.sources if source.endswith(".cpp")]
        ninja.compile(cpp, flags=flags, header=header)
        ninja.compile([s for s in extension.sources if s.endswith(".cu")], rule="nvcc")
        # Linked last and from the lowest set up: of an inline function that several objects hold,
        # the linker keeps the first.
        for name, flags in INSTRUCTION_SETS.items():
            defines = f"-Wno-psabi -DCPU_CAPABILITY={name} -DCPU_CAPABILITY_{name}"
            ninja.compile(KERNELS, flags=f"{defines} {' '.join(flags)}", folder=f"{name}/")

        extension.extra_objects, extension.sources = ninja.build(), []
        self.force = True  # whether to link: setuptools would look at the sources
        super().build_extension(extension)


EXTENSION = {
    "name": "tpkernels._C",
    "sources": sorted({*glob.glob("csrc/**/*.cpp", recursive=True)} - {*KERNELS}),
    "include_dirs": [] if use_cuda else nvtx_headers(),
    "define_macros": [
        ("USE_C10D_GLOO", None),
        ("TORCH_API_INCLUDE_EXTENSION_H", None),
        ("TORCH_EXTENSION_NAME", "_C"),
        ("_GLIBCXX_USE_CXX11_ABI", str(int(torch.compiled_with_cxx11_abi()))),
        *[("TPKERNELS_X86_KERNELS", None)] * x86,
    ],
}
if use_cuda:
    EXTENSION["sources"] += sorted(glob.glob("csrc/cuda/*.cu"))
Extension = CUDAExtension if use_cuda else CppExtension

setup(ext_modules=[Extension(**EXTENSION)], cmdclass={"build_ext": BuildKernels})
