"""Tensors laid out in memory otherwise than their neighbours, for ops that take several."""

import mmap

import pytest
import torch
from helpers import EXACT
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

FAR = 2**30  # elements between rows: the third lies beyond what 32 bits count
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # unnamed before Python 3.12


def apart(x):
    """Return the same values in rows with a gap between them."""
    return [torch.cat([x, x], -1)[..., : x.shape[-1]]]


def without_unit_stride(x):
    """Return the same values with a gap between any two: a single row shows it too."""
    return [torch.stack([x, x], -1)[..., 0]]


def far_apart(x):
    """Return the same values with rows 2^30 elements apart, along each dimension of three or more.

    The memory between them is never touched, and on a CPU only reserved.
    """
    found = []
    for dim in range(x.dim() - 1):
        rows = x.movedim(dim, 0).contiguous()
        if rows.shape[0] < 3:  # left as it is, so that all ranks make as many calls
            found.append(x)
            continue
        elements = (rows.shape[0] - 1) * FAR + rows[0].numel()
        if x.is_cuda:
            whole = x.new_empty(elements)
        else:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
            memory = mmap.mmap(-1, elements * x.element_size(), flags=flags)
            whole = torch.frombuffer(memory, dtype=x.dtype, count=elements)
        far = whole.as_strided(rows.shape, (FAR, *rows.stride()[1:])).copy_(rows)
        found.append(far.movedim(0, dim))
    return found


LAYOUTS = apart, without_unit_stride, far_apart
CASES = pytest.mark.parametrize(
    "rows,columns,lay",
    [
        (3, 64, apart),
        (3, 33, without_unit_stride),
        (1, 64, without_unit_stride),
        (3, 33, far_apart),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)


def arguments(rows, columns, dtype=torch.float32):
    """Return contiguous arguments of each elementwise op and of the GEMM with an epilogue.

    A key's first word is the op.
    """

    def rand(*shape):
        return torch.randn(*shape).to(dtype)

    def x():
        return rand(rows, columns)

    def stat():
        return torch.rand(rows) + 0.5

    def w(n=columns):
        return rand(n)

    target = torch.randint(0, 3 * columns, (rows,))
    grad = target, torch.full((rows,), 5.0), stat(), columns, 0.1, 3 * columns
    seed, angles = torch.tensor([7]), (rand(3, rows, 4), rand(3, rows, 4))
    return {
        "norm": (x(), x(), w(), w(), 1e-5, False),
        "norm alone": (x(), None, w(), None, 1e-5, True),
        "norm_backward": (x(), x(), x(), w(), rand(rows), stat(), False, True, True),
        "bias_act": (x(), w(), "gelu"),
        "bias_act_backward": (x(), x(), w(), "silu", True),
        "gated_act": (x(), x(), w(), w(), "swiglu"),
        "gated_act_backward": (x(), x(), x(), w(), w(), "geglu", True),
        "vocab_ce_stats": (x(), target, columns),
        "vocab_ce_grad": (x(), *grad),
        "vocab_ce_grad_": (x(), *grad),
        "dropout": (x(), seed, 0.5, 3, 2),
        "rotary": (rand(3, 3, rows, 10), *angles, False, False),
        "column_linear_act": (x(), rand(rows, columns), w(rows), "gelu", True),
        "column_linear_act gated": (x(), rand(2 * rows, columns), w(2 * rows), "swiglu", True),
    }


OPS = list(arguments(1, 1))


def check_operand_layouts(op, args, lay, **tolerance):
    """Require the same result of `op` where each operand in turn is laid out otherwise."""
    leaves, tree = tree_flatten(args)

    def results(index=0, laid=None):
        # Copies, because an op may write to its first operand and return nothing.
        given = [x.clone() if torch.is_tensor(x) else x for x in leaves]
        if laid is not None:
            given[index] = laid
        outs = op(*tree_unflatten(given, tree))
        return tree_leaves(given[0] if outs is None else outs)

    expected = results()
    for index, leaf in enumerate(leaves):
        for laid in lay(leaf) if torch.is_tensor(leaf) and leaf.dim() else ():
            for out, wanted in zip(results(index, laid), expected, strict=True):
                where = f"operand {index} of strides {laid.stride()}: ".__add__
                torch.testing.assert_close(out, wanted, **(tolerance or EXACT), msg=where)
