"""One compiled program for requests with different adapters: rows that choose, an adapter merged for a while, and a
router that chooses for each token.

Run: python examples/many_adapters.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skipc


def adapter(model: torch.nn.Module, name: str) -> skipc.Adapter:
    """Random numbers of rank 4; yours come from ``skipc.Adapter.load(folder)`` or ``bank.load(name, folder)``."""
    layers = {}
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "v_proj", "down_proj")):
            a, b = torch.randn(4, module.in_features) * 0.3, torch.randn(module.out_features, 4) * 0.3
            layers[path] = skipc.LoRA(a, b, scale=1.0)
    return skipc.Adapter(name, layers)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=128)
    ).eval()
    bank = skipc.AdapterBank(model, slots=4, max_rank=8)
    for name in ("french", "legal", "terse"):
        bank.load(name, adapter(model, name))
    compiled, prompt = skipc.compile(model, adapters=bank), torch.randint(3, 120, (1, 8)).expand(4, -1).contiguous()
    router = skipc.AdapterRouter(torch.randn(3, 64), ["french", "legal", None], top_k=2)

    for adapters, mode in (
        ([None, "french", "legal", {"french": 0.7, "terse": 0.3}], "unmerged"),
        ("terse", "merged"),
        (["terse", "terse", "terse", None], "mixture"),
        (router, "unmerged"),
    ):
        with compiled.session(adapters=adapters, adapter_mode=mode) as session:
            tokens = skipc.generate(compiled, prompt, max_new_tokens=8)
        print(adapters, *(row[8:].tolist() for row in tokens), sep="\n  ")
        print(" ", session.stats().adapters)
    with compiled.session(adapters="legal", skip={"model.layers.1.mlp"}) as session:
        skipc.generate(compiled, prompt, max_new_tokens=8)
    print(f"skipped, with its adapters: {session.stats().skipped}")
    assert session.stats().recompiles == 0


if __name__ == "__main__":
    main()
