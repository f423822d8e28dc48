"""Arguments of every registered op, for torch.library.opcheck."""

import torch
import torch.distributed as dist


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def half(*shape):
    return rand(*shape, dtype=torch.bfloat16)


def samples():
    """Return the name of each op -> a list of its arguments, this rank's."""
    torch.manual_seed(dist.get_rank())
    return {**linears(), **fused_linears(), **collectives(), **vocabulary(), **elementwise()}


def linears():
    group = dist.group.WORLD.group_name
    yes, no = [True] * 2, [False] * 2
    dys, weights = [rand(2, 35, 4), rand(2, 35, 3)], [rand(4, 6), rand(3, 6)]
    return {
        "row_linear": [
            (rand(2, 35, 4), rand(6, 4), rand(6), rand(2, 35, 6), group, 3, "row_forward"),
            (
                half(5, 4).t(),
                half(6, 5),
                None,
                None,
                group,
                1,
                "row_forward",
            ),
            (rand(4), rand(6, 4), rand(6), None, group, 2, "row_forward"),
        ],
        "linear": [
            (rand(2, 35, 4), rand(6, 4), rand(6), True),
            (rand(4), rand(6, 4), None, False),
            (rand(4, 3).t(), rand(6, 4), None, True),
        ],
        "row_linear_backward": [
            (rand(2, 35, 6), rand(2, 35, 4), rand(6, 4), True),
            (rand(6), rand(4), None, True),
            (rand(3, 6), None, rand(6, 4), False),
        ],
        "column_linear_backward": [
            (dys, rand(2, 35, 6), weights, True, yes, yes, group, 3, "column_backward"),
            (dys, rand(2, 35, 6), [], False, yes, no, group, 1, "column_backward"),
            (dys, None, weights, True, no, [False, True], group, 2, "column_backward"),
        ],
    }


def fused_linears():
    group = dist.group.WORLD.group_name
    return {
        "row_linear_rms_norm": [
            (
                rand(2, 35, 4),
                rand(6, 4),
                rand(6),
                rand(2, 35, 6),
                rand(6),
                1e-5,
                group,
                3,
                "row_forward",
            ),
            (
                half(5, 4),
                half(6, 4),
                None,
                None,
                rand(6),
                1e-5,
                group,
                1,
                "row_forward",
            ),
        ],
        "column_linear_act": [
            (rand(2, 3, 4), rand(6, 4), rand(6), "swiglu", True),
            (rand(3, 4), rand(6, 4), None, "gelu", False),
        ],
    }


def collectives():
    group = dist.group.WORLD.group_name
    return {
        "all_reduce_": [
            (rand(3, 4), group, "sum", "x"),
            (rand(3, 4).t(), group, "max", "x"),
            (torch.arange(5), group, "sum", "x"),
        ],
        "all_gather": [
            (rand(3, 4), group, "x"),
            (rand(3, 4).t(), group, "x"),
            (torch.arange(5), group, "x"),
        ],
        "empty_comm_buffer": [(rand(3), [2, 4])],
    }


def vocabulary():
    group, rank = dist.group.WORLD.group_name, dist.get_rank()
    ids, target = torch.tensor([[0, 4, 9], [9, 5, 4]]), torch.tensor([0, 9, -100, 5, 4, 3])
    vocab = 5 * rank, 10, -100  # start, classes, ignored index
    loss = group, "loss"
    all_grads, one_grad, no_grads = (True, True, True), (False, True, False), (False, False, False)
    return {
        "vocab_embedding": [
            (ids, rand(5, 4), 5 * rank, group, "embedding"),
            (ids[0].int(), rand(5 - 5 * rank, 4), 0, group, "embedding"),
        ],
        "vocab_ce": [(rand(6, 5), target, *vocab, smoothing, *loss) for smoothing in (0.0, 0.1)],
        "vocab_linear_ce": [
            (rand(6, 4), rand(5, 4), rand(5), target, rand(6), *vocab, 0.1, 4, *all_grads, *loss),
            (half(6, 4), half(5, 4), None, target, rand(6), *vocab, 0.0, 9, *one_grad, *loss),
            (rand(6, 4), rand(5, 4), rand(5), target, None, *vocab, 0.0, 2, *no_grads, *loss),
        ],
        "vocab_ce_stats": [
            (rand(6, 5), target, 5),
            (half(5, 6).t(), target, 5),
            (rand(6, 0), target, 0),
        ],
        "vocab_ce_grad": [
            (x, target, rand(6), rand(6), 5, 0.1, 10) for x in (rand(6, 5), half(6, 5))
        ],
        "vocab_ce_grad_": [(rand(6, 5), target, rand(6), rand(6), 5, 0.1, 10)],
    }


def elementwise():
    return {
        "bias_act": [
            (rand(2, 3, 8), rand(8), "gelu"),
            (rand(8, 3).t(), None, "swiglu"),
            (half(3, 8), rand(8), "relu2"),
        ],
        "bias_act_backward": [
            (rand(2, 3, 8), rand(2, 3, 8), rand(8), "gelu", True),
            (rand(3, 4), rand(3, 8), None, "swiglu", False),
        ],
        "gated_act": [
            (rand(2, 3, 4), rand(2, 3, 4), rand(4), rand(4), "geglu"),
            (rand(3, 8)[:, :4], rand(3, 8)[:, 4:], None, None, "swiglu"),
        ],
        "gated_act_backward": [
            (rand(3, 4), rand(3, 4), rand(3, 4), rand(4), rand(4), "geglu", True),
            (rand(3, 4), rand(3, 8)[:, :4], rand(3, 8)[:, 4:], None, None, "swiglu", False),
        ],
        "norm": [
            (rand(2, 3, 4), rand(2, 3, 4), rand(4), rand(4), 1e-5, False),
            (rand(4, 3).t(), None, None, None, 1e-5, True),
            (half(3, 4), None, rand(4), None, 1e-5, True),
        ],
        "norm_backward": [
            (
                rand(2, 3, 4),
                rand(2, 3, 4),
                rand(2, 3, 4),
                rand(4),
                rand(6),
                rand(6),
                False,
                True,
                True,
            ),
            (rand(3, 4), None, rand(3, 4), None, rand(0), rand(3), True, False, False),
        ],
        "dropout": [
            (rand(2, 3, 4), torch.tensor([7]), 0.3, 2, 5),
            (rand(4, 3).t(), torch.tensor([7]), 1.0, 0, 0),
        ],
        "rotary": [
            (rand(2, 3, 5, 8), rand(5, 4), rand(5, 4), False, False),
            (rand(2, 5, 3, 8).transpose(1, 2), rand(2, 5, 3), rand(2, 5, 3), True, True),
        ],
    }
