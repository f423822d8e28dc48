"""Tiny random Hugging Face models.

2 and 4 ranks do not divide their 9 heads and 3 KV heads.
"""

import torch

BASE = dict(
    hidden_size=72,
    intermediate_size=150,
    num_hidden_layers=2,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=331,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MHA = {k: v for k, v in BASE.items() if k != "num_key_value_heads"}
SOFTCAP = dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0, attn_implementation="eager")
SLIDING = dict(head_dim=16, sliding_window=8)
FAMILIES = {
    "llama": ("Llama", dict(BASE, head_dim=8)),
    "llama_tied": ("Llama", dict(BASE, head_dim=8, tie_word_embeddings=True, attention_bias=True)),
    "qwen2": ("Qwen2", BASE),
    "qwen3": ("Qwen3", dict(BASE, head_dim=16)),
    "gemma2": ("Gemma2", dict(BASE, query_pre_attn_scalar=16, **SLIDING, **SOFTCAP)),
    "gemma3": ("Gemma3", dict(BASE, query_pre_attn_scalar=16, **SLIDING)),
    "mistral": ("Mistral", dict(BASE, **SLIDING)),
    "phi3": ("Phi3", dict(BASE, original_max_position_embeddings=256)),
    "olmo2": ("Olmo2", BASE),
    "gpt2": (
        "GPT2",
        dict(
            n_embd=72,
            n_layer=2,
            n_head=9,
            n_positions=256,
            vocab_size=331,
            bos_token_id=1,
            eos_token_id=2,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        ),
    ),
    "gpt_neox": ("GPTNeoX", MHA),
    "stablelm": ("StableLm", BASE),
    "opt": ("OPT", dict(MHA, ffn_dim=150, word_embed_proj_dim=72, dropout=0.0)),
}
CONFIG = {"Gemma3": "Gemma3TextConfig"}
MODEL = {"GPT2": "GPT2LMHeadModel"}


def make(name: str, **changes) -> torch.nn.Module:
    import transformers

    kind, options = FAMILIES[name]
    options = {**options, **changes}
    attention = options.pop("attn_implementation", "sdpa")
    config = getattr(transformers, CONFIG.get(kind, f"{kind}Config"))(**options)
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, MODEL.get(kind, f"{kind}ForCausalLM"))(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
            else:
                parameter.mul_(4)
    return model


def batch(vocab: int = 331, size: int = 2, tokens: int = 24, seed: int = 7):
    ids = torch.randint(3, vocab, (size, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :5] = -100
    labels[-1, -3:] = -100
    return ids, labels
