"""A model of your own: a plan shards it, and it trains like the unsharded one.

torchrun --nproc-per-node 2 examples/own_model.py
"""

import copy
import os
from importlib import resources

import torch
import torch.nn.functional as F
from torch import nn

import tpkernels as tpk

HIDDEN, HEADS, TOKENS = 120, 5, 64  # 5 heads: 3 on one of 2 ranks, 2 on the other
PLAN = {  # module names -> styles; `*` stands for one part of a name
    "0": "embedding_rowwise",
    **{f"*.attention.{name}": "colwise" for name in "qkv"},
    "*.attention.out": "rowwise",
    "*.up": "colwise",
    "*.down": "rowwise",
    "*.norm*": "replicate",
    "3": "colwise_gather_output",
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim = HIDDEN // HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x):
        layers = self.q, self.k, self.v
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in layers)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def loss_of(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def main():
    torch.manual_seed(0)  # the same model on every rank
    mesh = tpk.init_mesh(tp=int(os.environ["WORLD_SIZE"]))
    stock = nn.Sequential(nn.Embedding(256, HIDDEN), Block(), Block(), nn.Linear(HIDDEN, 256))
    model = tpk.parallelize(copy.deepcopy(stock), mesh["tp"], PLAN)
    text = torch.tensor(list(resources.files("tpkernels.demo").joinpath("alice.txt").read_bytes()))
    batches = text[: len(text) // (4 * TOKENS) * 4 * TOKENS].view(-1, 4, TOKENS)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, stock)]
    for step in range(20):
        losses = []
        for m, optimizer in zip((model, stock), optimizers, strict=True):
            loss = loss_of(m, batches[step % len(batches)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if mesh.get_rank() == 0:
            print(f"step {step:2}  sharded {losses[0]:.5f}  unsharded {losses[1]:.5f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
