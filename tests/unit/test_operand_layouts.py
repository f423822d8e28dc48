"""The CPU ops read every operand by that operand's own strides."""

import layouts
import pytest
from cpu_ops import OPS


@layouts.CASES
@pytest.mark.parametrize("op", layouts.OPS)
def test_one_operand_laid_out_otherwise(ops, op, rows, columns, lay):
    # The order of ATen's sums, and of a GEMM's, may depend on the strides.
    exact = ops is OPS and not op.startswith("column_linear_act")
    close = {} if exact else dict(atol=1e-5, rtol=1e-5)
    layouts.check_operand_layouts(
        getattr(ops, op.split()[0]), layouts.arguments(rows, columns)[op], lay, **close
    )
