"""Tensor parallelism for PyTorch with communication overlapped by compute."""

import torch as _torch  # the extension links against its libraries

try:
    from . import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        "tpkernels' compiled part (tpkernels._C) is missing or was built for another torch: "
        "run `make setup` in a checkout, or `pip install --no-build-isolation .` with the torch "
        "in use"
    ) from error

from tpkernels_planner import plan

from . import functional, nn, profiling
from ._version import __version__ as __version__
from .checkpoint.unsharded import (
    load_unsharded_state_dict,
    unsharded_gradients,
    unsharded_state_dict,
)
from .kernels import registration as _registration
from .mesh import init_mesh
from .ops.collective_log import log_collectives
from .ops.collectives import all_reduce_
from .optim import GradScaler, clip_grad_norm_
from .overlap.calibrate import tune
from .parallelization.api import parallelize
from .parallelization.huggingface_plans import auto_plan

if (_torch.version.cuda or _torch.version.hip) and _registration.available():
    _registration.register()  # without Triton the ops run as a few ATen calls each

__all__ = [
    "GradScaler",
    "all_reduce_",
    "auto_plan",
    "clip_grad_norm_",
    "functional",
    "init_mesh",
    "load_unsharded_state_dict",
    "log_collectives",
    "nn",
    "parallelize",
    "plan",
    "profiling",
    "tune",
    "unsharded_gradients",
    "unsharded_state_dict",
]
