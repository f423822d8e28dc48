"""The output layer and the cross entropy of a vocabulary that is sharded over the ranks.

torchrun --nproc-per-node 2 examples/loss.py

No rank ever holds the logits of all classes, and no logits are sent.
"""

import os

import torch
import torch.nn.functional as F

import tpkernels as tpk

TOKENS, HIDDEN, CLASSES = 64, 32, 331  # 331 classes: 166 + 165 on 2 ranks


def main():
    torch.manual_seed(0)  # the same data on every rank
    mesh = tpk.init_mesh(tp=int(os.environ["WORLD_SIZE"]))
    rank, size = mesh.get_rank(), mesh["tp"].size()
    x, weight = torch.randn(TOKENS, HIDDEN), torch.randn(CLASSES, HIDDEN)
    target = torch.randint(CLASSES, (TOKENS,))

    shard = weight.chunk(size)[rank].clone().requires_grad_()
    x_sharded = x.clone().requires_grad_()
    with tpk.log_collectives() as log:
        loss = tpk.functional.vocab_parallel_linear_cross_entropy(
            x_sharded, shard, target, num_classes=CLASSES, group=mesh["tp"]
        )
        loss.backward()

    x.requires_grad_()
    stock_loss = F.cross_entropy(x @ weight.t(), target)
    stock_loss.backward()
    if rank == 0:
        print(f"loss: sharded {loss.item():.5f}, unsharded {stock_loss.item():.5f}")
        print(f"largest difference of a gradient: {(x_sharded.grad - x.grad).abs().max():.1e}")
        print(f"bytes in all-reduces: {sum(entry.bytes for entry in log):,}")
        print(f"bytes of the full logits: {TOKENS * CLASSES * 4:,}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
