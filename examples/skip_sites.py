"""Compile a small random Llama, list its sublayers, and skip two of them for one request.

Run: python examples/skip_sites.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skipc


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=128)
    ).eval()
    prompt = torch.randint(3, 120, (1, 8))
    print(skipc.find_sites(model, prompt, use_cache=False))

    compiled = skipc.compile(model)
    full = compiled.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    with compiled.session(skip={"model.layers.1.self_attn", "model.layers.1.mlp"}) as session:
        short = compiled.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    print("all sites:   ", full[0, 8:].tolist())
    print("two skipped: ", short[0, 8:].tolist())
    print(session.stats())
    assert session.stats().recompiles == 0


if __name__ == "__main__":
    main()
