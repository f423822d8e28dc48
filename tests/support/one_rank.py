"""Modules over all ranks against the same modules over one rank."""

import torch
import torch.distributed as dist
from helpers import EXACT
from torch.testing import assert_close

import tpkernels as tpk
from tpkernels.nn import (
    ColumnParallelLinear,
    ParallelMLP,
    ParallelSelfAttention,
    ParallelTransformerBlock,
    RowParallelLinear,
)
from tpkernels.ops.activation import ACTIVATIONS, GATED

WHOLE = {  # modules whose input and output are whole on every rank, with 18 features in and out
    "column": lambda **o: ColumnParallelLinear(18, 23, gather_output=True, **o),
    "column swiglu": lambda **o: ColumnParallelLinear(
        18, 22, gather_output=True, activation="swiglu", bias=False, **o
    ),
    "row": lambda **o: RowParallelLinear(18, 23, input_is_parallel=False, **o),
    "row in 3 chunks": lambda **o: RowParallelLinear(
        18, 23, False, input_is_parallel=False, overlap=3, **o
    ),
    **{
        f"mlp {a}": lambda a=a, **o: ParallelMLP(18, 27, activation=a, overlap=2, **o)
        for a in [*ACTIVATIONS, *GATED]
    },
    "mlp without bias": lambda **o: ParallelMLP(18, 3, bias=False, **o),
    "attention 9": lambda **o: ParallelSelfAttention(18, 9, **o),
    "attention 9/3": lambda **o: ParallelSelfAttention(18, 9, 3, overlap=2, **o),
    "attention 9/1": lambda **o: ParallelSelfAttention(18, 9, 1, **o),
    "attention 10/2": lambda **o: ParallelSelfAttention(
        18, 10, 2, head_dim=4, bias=False, causal=False, **o
    ),
    "block layernorm": lambda **o: ParallelTransformerBlock(18, 9, **o),
    "block rmsnorm": lambda **o: ParallelTransformerBlock(
        18, 9, 27, 3, norm="rmsnorm", activation="swiglu", bias=False, overlap=2, **o
    ),
}


def group_of_one():
    return [dist.new_group([r]) for r in range(dist.get_world_size())][dist.get_rank()]


def seeded(make, **options):
    torch.manual_seed(7)
    return make(**options)


def sharded_and_whole(name, alone):
    """Return the module over all ranks and over one rank, of the same weights to the bit."""
    sharded, whole = (seeded(WHOLE[name], group=group) for group in (dist.group.WORLD, alone))
    assert_close(dict(tpk.unsharded_state_dict(sharded)), dict(whole.state_dict()), **EXACT)
    return sharded, whole


def assert_near(ours, want, tolerance=2e-5):
    assert ours.shape == want.shape
    error = (ours - want).abs().max() / want.abs().max() if want.numel() else 0.0
    assert error < tolerance, f"{error:.1e}"


def assert_same_grads(want, sharded):
    """Compare the gradients of a sharded module with the unsharded ones, by name.

    The tolerance is relative to the parameter's largest gradient, or the module's where the true
    gradient is zero: a softmax does not see a bias of the keys.
    """
    grads = tpk.unsharded_gradients(sharded)
    assert grads.keys() == want.keys()
    largest = max(grad.abs().max() for grad in want.values())
    for name, grad in want.items():
        error = (grads[name] - grad).abs().max() / (
            largest if name.endswith("k_proj.bias") else grad.abs().max()
        )
        assert error < 2e-5, f"{name}: {error:.1e}"


def assert_same_run(sharded, whole, x, *inputs):
    """Outputs, the input's gradient and the parameters' gradients."""
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, want = sharded(mine, *inputs), whole(theirs, *inputs)
    assert_near(out, want)
    dy = torch.randn_like(want)
    out.backward(dy)
    want.backward(dy)
    assert_near(mine.grad, theirs.grad)
    assert_same_grads({name: p.grad for name, p in whole.named_parameters()}, sharded)
