"""Arguments that the functions of one rank refuse."""

import pytest
import torch

import tpkernels.functional as tpf

X, N4, N3 = torch.zeros(2, 4), torch.zeros(4), torch.zeros(3)


TABLES = torch.zeros(5, 2), torch.zeros(5, 2)


HEADS = torch.zeros(1, 2, 5, 4)


REFUSED = {
    "bias_act of integers": (lambda: tpf.bias_act(X.long(), None, "gelu"), TypeError, "int64"),
    "bias_act with a scalar": (
        lambda: tpf.bias_act(X[0, 0], None, "gelu"),
        ValueError,
        "at least one dimension",
    ),
    "bias_act with another bias": (
        lambda: tpf.bias_act(X, N3, "gelu"),
        ValueError,
        r"bias has shape \(3,\) but input has 4 features",
    ),
    "bias_act of an unknown kind": (lambda: tpf.bias_act(X, None, "tanh"), ValueError, "'tanh'"),
    "bias_act of odd halves": (
        lambda: tpf.bias_act(X[:, :3], None, "swiglu"),
        ValueError,
        "3 features",
    ),
    "gated_act, not gated": (lambda: tpf.gated_act(X, X, "gelu"), ValueError, "swiglu, geglu"),
    "gated_act of integers": (lambda: tpf.gated_act(X, X.long(), "geglu"), TypeError, "int64"),
    "gated_act of two shapes": (lambda: tpf.gated_act(X, X[:1], "geglu"), ValueError, "one shape"),
    "gated_act with one bias": (
        lambda: tpf.gated_act(X, X, "geglu", N4),
        ValueError,
        "both or neither",
    ),
    "gated_act with another bias": (
        lambda: tpf.gated_act(X, X, "geglu", N4, N3),
        ValueError,
        "up_bias",
    ),
    "rms_norm of integers": (lambda: tpf.rms_norm(X.long()), TypeError, "int64"),
    "rms_norm of a scalar": (lambda: tpf.rms_norm(X[0, 0]), ValueError, "at least one dimension"),
    "rms_norm with another weight": (
        lambda: tpf.rms_norm(X, N3),
        ValueError,
        r"weight has shape \(3,\)",
    ),
    "layer_norm with another bias": (
        lambda: tpf.layer_norm(X, N4, N3),
        ValueError,
        r"bias has shape \(3,\)",
    ),
    "layer_norm with another residual": (
        lambda: tpf.layer_norm(X, residual=X[:1]),
        ValueError,
        "residual",
    ),
    "dropout of integers": (lambda: tpf.dropout(X.long()), TypeError, "int64"),
    "dropout of a scalar": (lambda: tpf.dropout(X[0, 0]), ValueError, "at least one dimension"),
    "dropout of too much": (lambda: tpf.dropout(X, 1.5), ValueError, r"\[0, 1\], got 1.5"),
    "dropout of nan": (lambda: tpf.dropout(X, float("nan")), ValueError, "nan"),
    "dropout before the first row": (
        lambda: tpf.dropout(X, row=-1),
        ValueError,
        "must not be negative, got -1 and 0",
    ),
    "dropout before the first column": (
        lambda: tpf.dropout(X, column=-1),
        ValueError,
        "must not be negative, got 0 and -1",
    ),
    "dropout with a float seed": (lambda: tpf.dropout(X, seed=torch.ones(1)), ValueError, "seed"),
    "dropout with two seeds": (
        lambda: tpf.dropout(X, seed=torch.tensor([1, 2])),
        ValueError,
        "seed",
    ),
    "rotary of integers": (lambda: tpf.rotary(HEADS.long(), *TABLES), TypeError, "int64"),
    "rotary of three dimensions": (lambda: tpf.rotary(HEADS[0], *TABLES), ValueError, "head_dim"),
    "rotary with other tokens": (
        lambda: tpf.rotary(HEADS[:, :, :4], *TABLES),
        ValueError,
        "cos and sin must be",
    ),
    "rotary of too many features": (
        lambda: tpf.rotary(HEADS, torch.zeros(5, 3), torch.zeros(5, 3)),
        ValueError,
        "cos has 3 pairs of features, but head_dim 4 has 2",
    ),
    "rotary cosines that learn": (
        lambda: tpf.rotary(HEADS, TABLES[0].clone().requires_grad_(), TABLES[1]),
        ValueError,
        "no gradient",
    ),
    "rotary sines that learn": (
        lambda: tpf.rotary(HEADS, TABLES[0], TABLES[1].clone().requires_grad_()),
        ValueError,
        "no gradient",
    ),
    "tables of odd features": (lambda: tpf.rotary_tables(5, 3), ValueError, "even"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
