"""Greedy tokens of SmolLM2 in fp32: ``skipc.generate`` against eager, on many prompts. Ties are listed.

Run: python benchmarks/tokens.py [--prompts 50] [--new 256]
"""

from __future__ import annotations

from typing import Any

import click
import torch
from common import console, save
from rich.progress import track

import skipc
from skipc.calibration.text import english_text
from skipc.loading import load_smollm2


@torch.no_grad()
def eager_tokens(model: Any, ids: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens of the model itself, int64 [prompt + new], and the gap of the top two logits at each, [new]."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + new)
    logits = model(ids, past_key_values=cache).logits[0, -1]
    tokens, gaps = ids[0].tolist(), []
    for _ in range(new):
        top = logits.topk(2).values
        gaps.append(top[0] - top[1])
        tokens.append(int(logits.argmax()))
        logits = model(torch.tensor([[tokens[-1]]]), past_key_values=cache).logits[0, -1]
    return torch.tensor(tokens), torch.stack(gaps)


@click.command()
@click.option("--prompts", default=50, show_default=True)
@click.option("--new", default=256, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--json", "path", help="Write the figures here.")
def main(prompts: int, new: int, threads: int, path: str | None) -> None:
    """Compare greedy tokens."""
    torch.set_num_threads(threads)
    model, tokenizer = load_smollm2()
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    ids = tokenizer(english_text(), return_tensors="pt").input_ids[0]
    record: dict[str, Any] = {"prompts": prompts, "new": new, "divergences": []}
    for i in track(range(prompts), description="prompts"):
        length = 8 + 7 * (i % 20)
        prompt = ids[i * 997 % (len(ids) - length) :][:length][None]
        expected, gaps = eager_tokens(model, prompt, new)
        found = skipc.generate(compiled, prompt, max_new_tokens=new, eos_token_id=None)[0]
        if not torch.equal(found, expected):
            at = int((found != expected).nonzero()[0]) - length
            record["divergences"].append({"prompt": i, "token": at, "gap": float(gaps[at])})
            console.print(f"prompt {i} diverges at new token {at}: top two logits {float(gaps[at]):.2e} apart")
    console.print(f"{prompts - len(record['divergences'])} of {prompts} prompts give the tokens of eager")
    save(path, record)


if __name__ == "__main__":
    main()
