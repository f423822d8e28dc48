"""Tensor parallelism inside FSDP2: two ranks a tensor-parallel group, the rest data-parallel.

torchrun --nproc-per-node 4 examples/fsdp2.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

import tpkernels as tpk

HIDDEN, BATCH = 48, 8
PLAN = {"*.up": "colwise", "*.down": "rowwise"}


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


def make_model():
    torch.manual_seed(0)  # the same model on every rank
    return nn.Sequential(MLP(), MLP())


def step(model, optimizer, x):
    """Train one step; return this rank's loss."""
    loss = (model(x) - 1).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def main():
    dp = int(os.environ["WORLD_SIZE"]) // 2
    mesh = tpk.init_mesh(tp=2, dp=dp)
    stock, model = make_model(), make_model()
    tpk.parallelize(model, mesh["tp"], PLAN)  # first: FSDP shards what each rank keeps
    for block in model:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    stock_optimizer = torch.optim.AdamW(stock.parameters(), 1e-3)
    replica = mesh["dp"].get_local_rank()
    batches = torch.randn(5, dp * BATCH, HIDDEN, generator=torch.Generator().manual_seed(1))
    for number, batch in enumerate(batches):
        stock_loss = step(stock, stock_optimizer, batch)
        loss = step(model, optimizer, batch.chunk(dp)[replica])  # each replica its own part
        dist.all_reduce(loss, group=mesh["dp"].get_group())
        if mesh.get_rank() == 0:
            print(f"step {number}  sharded {loss / dp:.5f}  unsharded {stock_loss:.5f}")
    state = tpk.unsharded_state_dict(model)
    error = max((state[name] - value).abs().max() for name, value in stock.state_dict().items())
    if mesh.get_rank() == 0:
        print(f"largest difference of a weight: {error:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
