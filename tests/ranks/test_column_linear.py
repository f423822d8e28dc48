"""Column-parallel layers are the same with the activation in the epilogue of the GEMM."""

from unittest import mock

import torch
import torch.distributed as dist
from pool import run_on_ranks

import tpkernels as tpk
from tpkernels.nn import ColumnParallelLinear, ParallelMLP
from tpkernels.ops import column_linear


@run_on_ranks(1, 2, 3)
def test_the_same_layers():
    group, found = dist.group.WORLD, []
    for fused in (False, True):
        calls = []
        real = torch.ops.tpkernels.column_linear_act

        def op(*args, calls=calls, real=real):
            calls.append(args[4])
            return real(*args)

        with (
            mock.patch.object(column_linear, "fuses_activation", lambda *args, fused=fused: fused),
            mock.patch.object(torch.ops.tpkernels, "column_linear_act", op),
            tpk.log_collectives() as log,
        ):
            torch.manual_seed(0)
            x, results = torch.randn(3, 7, 12, requires_grad=True), []
            for activation in ("gelu_tanh", "swiglu", "relu"):
                layer = ParallelMLP(12, 22, activation=activation, group=group)
                y = layer(x)
                y.square().sum().backward()
                results += [y.detach(), x.grad, *tpk.unsharded_gradients(layer).values()]
                x.grad = None
                with torch.no_grad():
                    results.append(layer(x))
            frozen = ColumnParallelLinear(12, 22, activation="gelu", group=group).requires_grad_(
                False
            )
            frozen(x).sum().backward()
            results += [x.grad]
            weight_only = ColumnParallelLinear(12, 22, False, activation="silu", group=group)
            weight_only(x.detach()).sum().backward()
            results += [weight_only.weight.grad]
        # The pre-activation is stored for a gradient only.
        assert calls == ([True, False] * 3 + [True, True] if fused else [])
        found.append((results, [(c.tag, c.bytes) for c in log]))
    (plain, sent), (fused, sent_too) = found
    assert sent == sent_too
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
