"""Builds tpkernels._C: against a CPU torch, or against a CUDA torch where its toolkit is installed. No GPU is asked for."""

import glob
import importlib.util
import os

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

# What the torch in use was built for decides, never torch.cuda.is_available(): a builder has no GPU.
use_cuda = torch.version.cuda is not None and CUDA_HOME is not None and os.environ.get("TPKERNELS_BUILD_CUDA") != "0"
if torch.version.cuda is not None and not use_cuda:
    print(f"tpkernels: building without CUDA kernels: torch is for CUDA {torch.version.cuda}, CUDA_HOME={CUDA_HOME}")

sources = sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/overlap/*.cpp") + glob.glob("csrc/fused/*.cpp") + glob.glob("csrc/cpu/*.cpp"))
if use_cuda:
    sources += sorted(glob.glob("csrc/cuda/*.cu"))
Extension = CUDAExtension if use_cuda else CppExtension


def nvtx_headers():
    """Of the nvidia-nvtx wheel, for builds without a CUDA toolkit, which has its own. Where there are none the ranges are left out."""
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations if packages else []
    return [root for folder in folders for root in glob.glob(f"{folder}/*/include") if os.path.exists(f"{root}/nvtx3/nvToolsExt.h")][:1]


setup(
    ext_modules=[
        Extension(
            "tpkernels._C",
            sources,
            include_dirs=[os.path.abspath("csrc/include"), *([] if use_cuda else nvtx_headers())],
            extra_compile_args={"cxx": ["-O3", "-fvisibility=hidden"], "nvcc": ["-O3", "--extended-lambda"]},
            define_macros=[("USE_C10D_GLOO", None)],
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
