"""A model of your own, split by a plan and trained beside the unsplit one.

torchrun --nproc-per-node 2 examples/own_model.py
"""

import copy
import os
from importlib import resources

import torch
import torch.nn.functional as F
from torch import nn

import tpkernels as tpk

HIDDEN, HEADS, LAYERS, TOKENS = 120, 5, 2, 64


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.attention = Attention()
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim = HIDDEN // HEADS
        self.q, self.k, self.v, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, HIDDEN), nn.Linear(HIDDEN, 256, bias=False)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))

    def forward(self, ids):
        return F.cross_entropy(
            self.head(self.blocks(self.embedding(ids)))[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )


PLAN = {
    "embedding": "embedding_rowwise",
    "blocks.*.attention.q": "colwise",
    "blocks.*.attention.k": "colwise",
    "blocks.*.attention.v": "colwise",
    "blocks.*.attention.out": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
    "blocks.*.norm*": "replicate",  # beside split layers, but applied to whole activations: only the plan can say
    "head": "colwise_gather_output",
}


def main():
    torch.manual_seed(0)
    mesh = tpk.init_mesh(tp=int(os.environ["WORLD_SIZE"]))
    stock = Model()
    model = tpk.parallelize(copy.deepcopy(stock), mesh["tp"], PLAN)
    text = torch.tensor(list(resources.files("tpkernels").joinpath("data/alice.txt").read_bytes()))
    batches = text[: len(text) // (4 * TOKENS) * 4 * TOKENS].view(-1, 4, TOKENS)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-3) for m in (model, stock)]
    for step in range(20):
        losses = []
        for m, optimizer in zip((model, stock), optimizers, strict=True):
            loss = m(batches[step % len(batches)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if mesh.get_rank() == 0:
            print(f"step {step:2}  split {losses[0]:.5f}  unsplit {losses[1]:.5f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
