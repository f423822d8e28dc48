"""Builds tpkernels._C: against a CPU torch, or against a CUDA torch where its toolkit is installed. No GPU is asked for."""

import glob
import importlib.util
import os
import platform

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# What the torch in use was built for decides, never torch.cuda.is_available(): a builder has no GPU.
use_cuda = (
    torch.version.cuda is not None
    and CUDA_HOME is not None
    and os.environ.get("TPKERNELS_BUILD_CUDA") != "0"
)
if torch.version.cuda is not None and not use_cuda:
    print(
        f"tpkernels: building without CUDA kernels: torch is for CUDA {torch.version.cuda}, CUDA_HOME={CUDA_HOME}"
    )

# The CPU kernels are compiled once for each instruction set, as torch's own are, and chosen at run time.
x86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
INSTRUCTION_SETS = {"DEFAULT": []}
if x86:
    INSTRUCTION_SETS |= {
        "AVX2": AVX2,
        "AVX512": [
            *AVX2,
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mprefer-vector-width=512",
        ],
    }
CXX_FLAGS = ["-O3", "-fvisibility=hidden"]
# at::parallel_for is a header's. No OpenMP library is linked: its symbols come from the one that torch brought, with torch's threads.
OPENMP = ["-fopenmp"] * (torch.backends.openmp.is_available() and platform.system() == "Linux")


class BuildKernels(BuildExtension):
    def build_extension(self, extension):
        # Linked last and from the lowest set up: of an inline function that several objects hold, the linker keeps the first.
        for name, flags in INSTRUCTION_SETS.items():
            extension.extra_objects += self.compiler.compile(
                sorted(glob.glob("csrc/cpu/kernels/*.cpp")),
                output_dir=os.path.join(self.build_temp, name),
                macros=[("CPU_CAPABILITY", name), (f"CPU_CAPABILITY_{name}", None)],
                include_dirs=extension.include_dirs,
                extra_postargs=[*CXX_FLAGS, *flags],
            )
        super().build_extension(extension)


sources = sorted(
    path
    for folder in (".", "overlap", "fused", "cpu", "shm")
    for path in glob.glob(f"csrc/{folder}/*.cpp")
)
if use_cuda:
    sources += sorted(glob.glob("csrc/cuda/*.cu"))
Extension = CUDAExtension if use_cuda else CppExtension


def nvtx_headers():
    """Of the nvidia-nvtx wheel, for builds without a CUDA toolkit, which has its own. Where there are none the ranges are left out."""
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations if packages else []
    return [
        root
        for folder in folders
        for root in glob.glob(f"{folder}/*/include")
        if os.path.exists(f"{root}/nvtx3/nvToolsExt.h")
    ][:1]


setup(
    ext_modules=[
        Extension(
            "tpkernels._C",
            sources,
            include_dirs=[os.path.abspath("csrc/include"), *([] if use_cuda else nvtx_headers())],
            extra_compile_args={"cxx": [*CXX_FLAGS, *OPENMP], "nvcc": ["-O3", "--extended-lambda"]},
            define_macros=[("USE_C10D_GLOO", None)] + [("TPKERNELS_X86_KERNELS", None)] * x86,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
