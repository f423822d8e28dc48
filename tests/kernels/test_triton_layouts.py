"""The Triton kernels read every operand by that operand's own strides."""

import importlib

import layouts
import pytest
import torch

from tpkernels.kernels import norm
from tpkernels.kernels.launch_config import Config
from tpkernels.kernels.registration import OP_MODULES

modules = [importlib.import_module(f"tpkernels.kernels.{name}") for name in OP_MODULES]
OPS = {name: launch for module in modules for name, launch in module.OPS.items()}


@layouts.CASES
@pytest.mark.parametrize("op", layouts.OPS)
def test_one_operand_laid_out_otherwise(op, rows, columns, lay, device):
    to_device = lambda arg: arg.to(device) if torch.is_tensor(arg) else arg  # noqa: E731
    args = map(to_device, layouts.arguments(rows, columns)[op])
    layouts.check_operand_layouts(OPS[op.split()[0]], list(args), lay)


@layouts.CASES
@pytest.mark.parametrize("op", ["norm", "norm alone", "norm_backward"])
def test_one_operand_of_long_rows_laid_out_otherwise(op, rows, columns, lay, device, monkeypatch):
    config = Config(dict(BLOCK_M=2, BLOCK_N=16))
    for tunable in (norm.FORWARD, norm.BACKWARD):
        monkeypatch.setattr(tunable, "candidates", lambda features, itemsize: [config])
    test_one_operand_laid_out_otherwise(op, rows, columns, lay, device)
