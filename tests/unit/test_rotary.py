"""The rotary embedding as a differentiable function."""

import itertools

import pytest
import reference
import torch
from helpers import assert_as_accurate, grads_of, turned
from torch.testing import assert_close

import tpkernels.functional as tpf


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_rotary(interleaved, batched):
    torch.manual_seed(0)
    cos, sin = tpf.rotary_tables(7, 6)
    tables = (
        [t.expand(2, 7, 3) * torch.tensor([1.0, -1.0])[:, None, None] for t in (cos, sin)]
        if batched
        else [cos, sin]
    )
    for head_dim, dtype in itertools.product((6, 8), (torch.float32, torch.bfloat16)):
        # Projections give it in this layout.
        x, dy = (torch.randn(2, 7, 3, head_dim).to(dtype).transpose(1, 2) for _ in range(2))
        ours = grads_of(lambda x: tpf.rotary(x, *tables, interleaved=interleaved), [x], dy)
        truth = grads_of(lambda x: turned(x, *tables, interleaved), [x.double()], dy.double())
        same_dtype = grads_of(
            lambda x: reference.rotary(x, *(t.to(x.dtype) for t in tables), interleaved, False),
            [x],
            dy,
        )
        for name, *values in zip(("y", "dx"), ours, same_dtype, truth, strict=True):
            assert values[0].dtype == dtype
            assert_as_accurate(name, *values)
    x = torch.randn(2, 3, 7, 6, requires_grad=True)
    tpf.rotary(x, cos, sin).sum().backward()  # a gradient without strides
    assert_close(x.grad.double(), grads_of(lambda x: turned(x, cos, sin, False), [x.double()])[1])


def test_rotary_is_llamas():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    cos, sin = tpf.rotary_tables(9, 8, theta=500000.0)
    want = apply_rotary_pos_emb(q, k, *(torch.cat([t, t], -1)[None] for t in (cos, sin)))
    assert_close([tpf.rotary(t, cos, sin) for t in (q, k)], list(want))
    angle = torch.tensor(5.0) * 500000.0 ** (-2 / 8)
    assert_close(torch.stack([cos[5, 1], sin[5, 1]]), torch.stack([angle.cos(), angle.sin()]))
