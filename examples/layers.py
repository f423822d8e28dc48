"""An MLP of two parallel layers: the numbers of nn.Linear, and two all-reduces a training step.

torchrun --nproc-per-node 2 examples/layers.py
"""

import os

import torch
import torch.nn.functional as F
from torch import nn

import tpkernels as tpk

TOKENS, HIDDEN, FFN = 96, 64, 250  # 250 features: any number, whether the ranks divide it or not


def integers(linear):
    """Give a layer small integer weights, which floats add without rounding."""
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape))
    return linear


def main():
    torch.manual_seed(0)  # the same data on every rank
    mesh = tpk.init_mesh(tp=int(os.environ["WORLD_SIZE"]))
    first, second = integers(nn.Linear(HIDDEN, FFN)), integers(nn.Linear(FFN, HIDDEN))
    x = torch.randint(-2, 3, (TOKENS, HIDDEN)).float().requires_grad_()
    dy = torch.randint(-2, 3, (TOKENS, HIDDEN)).float()

    # Each rank holds a part of the features in between. "up" needs no communication in forward,
    # and "down" sums the ranks' results: in 3 chunks of rows, each under the next chunk's GEMM.
    up = tpk.nn.ColumnParallelLinear.from_linear(first, group=mesh["tp"])
    down = tpk.nn.RowParallelLinear.from_linear(second, group=mesh["tp"], overlap=3)
    with tpk.log_collectives() as log:
        y = down(F.relu(up(x)), residual=x)
        y.backward(dy)

    x_stock = x.detach().clone().requires_grad_()
    y_stock = second(F.relu(first(x_stock))) + x_stock
    y_stock.backward(dy)
    if mesh.get_rank() == 0:
        print(f"weights on rank 0: up {tuple(up.weight.shape)}, down {tuple(down.weight.shape)}")
        print(f"output equal to the bit: {torch.equal(y, y_stock)}")
        print(f"input gradient equal to the bit: {torch.equal(x.grad, x_stock.grad)}")
        for entry in log:
            chunk = f"chunk {entry.chunk + 1} of {entry.chunks}"
            print(f"{entry.op} {entry.tag}: {chunk}, {entry.bytes:,} bytes")
        print(down.explain(rows=TOKENS))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
