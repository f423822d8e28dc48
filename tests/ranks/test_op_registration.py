"""The registered ops by torch.library.opcheck: schemas, fake kernels, functionalisation."""

import layouts
import pytest
import torch
from op_samples import rand, samples
from pool import run_on_ranks

import tpkernels  # noqa: F401  (registers the ops)

# A view of its input or a copy, which no schema says; one that C++ alone calls; one of GPUs.
UNCHECKED = {"autocast_to", "add_bias_residual_", "open_peer_memory"}
REGISTERED = {
    name.partition("::")[2].partition(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("tpkernels::")
}
# Not test_autograd_registration: it passes without a look where nothing requires a gradient, and
# asks for an autograd kernel where something does. The ops have none: autograd.Functions call
# them, below autograd.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", sorted(REGISTERED - UNCHECKED))
@run_on_ranks(2)
def test_opcheck(name):
    # An uninitialised buffer has no values to compare between two runs.
    checks = CHECKS[:2] if name == "empty_comm_buffer" else CHECKS
    op = getattr(torch.ops.tpkernels, name).default
    for args in samples()[name]:
        result = torch.library.opcheck(op, args, test_utils=checks)
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("lay", layouts.LAYOUTS, ids=lambda lay: lay.__name__)
@pytest.mark.parametrize("name", sorted(REGISTERED - UNCHECKED - {"empty_comm_buffer"}))
@run_on_ranks(2)
def test_one_operand_laid_out_otherwise(name, lay):
    op = getattr(torch.ops.tpkernels, name).default
    for args in samples()[name]:
        close = dict(atol=None, rtol=None)  # by dtype: a GEMM's sums depend on the layout
        layouts.check_operand_layouts(op, args, lay, **close)


@run_on_ranks(1)
def test_every_op_is_checked():
    assert REGISTERED ^ samples().keys() == UNCHECKED


@run_on_ranks(2)
def test_an_op_that_writes_to_a_tensor_counts_in_its_version():
    args = {**samples(), "add_bias_residual_": [(rand(3, 4), rand(4), rand(3, 4))]}
    written = set()
    for name in sorted(REGISTERED - {"open_peer_memory"}):
        op = getattr(torch.ops.tpkernels, name).default
        for index, argument in enumerate(op._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                tensor = args[name][0][index]
                version = tensor._version
                op(*args[name][0])
                assert tensor._version == version + 1, name
                written.add(name)
    assert written == {"add_bias_residual_", "all_reduce_", "vocab_ce_grad_"}
