"""A Hugging Face model: sharded by its own plan, trained, and asked to generate.

torchrun --nproc-per-node 2 examples/huggingface.py [NAME_OR_FOLDER]

Without a name it takes a small random Llama with 9 heads and 3 KV heads.
"""

import os
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tpkernels as tpk


def load(name=None):
    """Return the same model on every rank."""
    torch.manual_seed(0)
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    config = LlamaConfig(
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=331,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(model, ids):
    """Return the losses of five steps."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss  # from sharded logits, nothing gathered
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(name=None):
    mesh = tpk.init_mesh(tp=int(os.environ["WORLD_SIZE"]))
    model, stock = load(name), load(name)
    ids = torch.arange(64).view(2, 32)
    tpk.parallelize(model, mesh["tp"])
    losses, stock_losses = train(model, ids), train(stock, ids)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    words = model.generate(ids[:1, :8], **options)[0, 8:].tolist()
    stock_words = stock.generate(ids[:1, :8], **options)[0, 8:].tolist()
    # Stock names, shapes and layout: for save_pretrained of an unsharded model.
    state = tpk.unsharded_state_dict(model, rank0_only=True, cpu_offload=True)
    if mesh.get_rank() == 0:
        for step, pair in enumerate(zip(losses, stock_losses, strict=True)):
            print("step {}  sharded {:.5f}  unsharded {:.5f}".format(step, *pair))
        print(f"generated: {words}")
        print(f"the same without sharding: {words == stock_words}")
        print(f"state names as in the stock model: {state.keys() == stock.state_dict().keys()}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
