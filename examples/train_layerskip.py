"""Train a small model that can draft for itself, and see what that is worth.

LayerSkip's recipe (arXiv 2404.16710): later layers are dropped at random, more often the later they are and the longer
training goes on, and the head that all layers share learns to read each of them. The text is the source code that comes
with Python; some of its files are kept back for what is measured at the end. Then, with the model frozen, an adapter
behind a quarter of the layers learns to say what the whole model says (a plan: the layers behind are left out, but for
one map of low rank), and a router learns which tokens need the upper half.

Training takes 12 minutes on two cores, and goes on where it stopped if it is interrupted.

Run: python examples/train_layerskip.py [--folder layerskip] [--minutes 12]
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import skipc
from skipc.calibration.batches import Batch
from skipc.calibration.distillation import distill
from skipc.calibration.text import library_files
from skipc.ir.site import Source

TOKENS, ROWS = 256, 4
DROP = 0.2  # LayerSkip's p_max
EXIT = 1.0  # what an exit counts beside the last layer
RATE = 3e-3
RANK = 64  # of the adapter


# -- text -------------------------------------------------------------------------------------------------------------


def sources() -> tuple[str, str]:
    """Python's library, and the part of it that no training sees: each twelfth file."""
    texts = [p.read_text(encoding="utf-8", errors="ignore") for p in library_files()]
    return "".join(t for i, t in enumerate(texts) if i % 12), "".join(texts[::12])


def tokens_of(text: str) -> torch.Tensor:
    """Its bytes, which are this model's tokens: int64 ``[tokens]``."""
    return torch.tensor(list(text.encode("utf-8", errors="ignore")))


def drawn(tokens: torch.Tensor, rows: int, length: int, draw: random.Random) -> torch.Tensor:
    """Stretches of the text: int64 ``[rows, length]``."""
    starts = [draw.randrange(len(tokens) - length) for _ in range(rows)]
    return torch.stack([tokens[s : s + length] for s in starts])


# -- training ---------------------------------------------------------------------------------------------------------


def new_model(layers: int = 12, width: int = 256) -> LlamaForCausalLM:
    """A llama, by default of 10 million parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
            num_attention_heads=width // 64, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def losses(model: LlamaForCausalLM, ids: torch.Tensor, done: float, exit_at: int, draw: random.Random) -> torch.Tensor:
    """The loss of one step: of the last layer and of the exit behind layer ``exit_at``; ``done`` is the share of the
    training that has passed. What an exit says is compared with the text, as in the paper, and as much with what the
    last layer says: agreeing with that is all that a draft is for. (The paper also gives early exits less weight than
    late ones, which here would spoil the cheap drafts.)"""
    body, depth = model.model, model.config.num_hidden_layers
    stream = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    rotary = body.rotary_emb(stream, positions)
    said = {}
    for i, layer in enumerate(body.layers):
        grown = (2 ** (i / (depth - 1)) - 1) * (2**done - 1)  # D(l) and S(t) of section 4.1.1
        if draw.random() >= DROP * grown:
            stream = layer(stream, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        if i in (exit_at, depth - 1):
            said[i] = model.lm_head(body.norm(stream[:, :-1])).float().flatten(0, 1)
    early, last, text = said[exit_at], said[depth - 1], ids[:, 1:].flatten()
    early_loss = (F.cross_entropy(early, text) + F.cross_entropy(early, last.detach().softmax(-1))) / 2
    return (F.cross_entropy(last, text) + EXIT * early_loss) / (1 + EXIT)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' weights, which learns as much in half the steps, and Adam for the rest."""
    weights = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not w for w in weights)]
    return [
        torch.optim.Muon(weights, lr=RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(model: LlamaForCausalLM, tokens: torch.Tensor, minutes: float, folder: Path) -> LlamaForCausalLM:
    """The model, trained for so long, over all runs together; the state goes to ``folder`` each minute."""
    both = optimizers(model)
    for layer in model.model.layers:
        layer.compile(dynamic=False)  # one graph serves all of them
    state = {"seconds": 0.0, "step": 0}
    file = folder / "training.pt"
    if file.exists():
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        for optimizer, kept in zip(both, saved["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        state = saved["state"]
        print(f"goes on at step {state['step']}, after {state['seconds'] / 60:.1f} minutes")
    written = last = time.perf_counter()
    shown: list[float] = []
    while state["seconds"] < 60 * minutes:
        draw = random.Random(state["step"])
        done = state["seconds"] / (60 * minutes)
        for group in (g for optimizer in both for g in optimizer.param_groups):
            group["lr"] = RATE * min(1, (state["step"] + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        exit_at = state["step"] % (model.config.num_hidden_layers // 2)  # one after the other: the curriculum C_rot
        with torch.autocast("cpu", torch.bfloat16):
            loss = losses(model, drawn(tokens, ROWS, TOKENS, draw), done, exit_at, draw)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        now = time.perf_counter()
        state = {"seconds": state["seconds"] + now - last, "step": state["step"] + 1}
        last = now
        shown.append(loss.item())
        if now - written > 60 or state["seconds"] >= 60 * minutes:
            print(f"{state['seconds'] / 60:5.1f} minutes, step {state['step']}: loss {statistics.mean(shown):.3f}")
            written, shown = now, []
            part = file.with_suffix(".part")
            torch.save({"model": model.state_dict(), "state": state,
                        "optimizers": [optimizer.state_dict() for optimizer in both]}, part)  # fmt: skip
            part.rename(file)
    plain = LlamaForCausalLM(model.config).eval()  # without layers that are compiled for training
    plain.load_state_dict(model.state_dict())
    return plain


# -- what the policies of skipc take ----------------------------------------------------------------------------------


def train_adapter(
    model: LlamaForCausalLM, depth: int, batches: list[torch.Tensor], file: Path, steps: int = 120
) -> skipc.Plan:
    """An exit behind ``depth`` layers through one map of low rank, trained to say what the whole model says."""
    sites = skipc.find_sites(model, batches[0][:1, :16]).sites
    behind = [s for s in sites if s.layer >= depth]
    last = next(s for s in behind if s.kind == "mlp")
    width = model.config.hidden_size
    skip = [s.name for s in behind if s is not last]
    source = Source(f"model.layers.{depth}.post_attention_layernorm", True, width)
    if file.exists():
        return skipc.Plan(skip, replace={last.name: skipc.LowRank(source, **load_file(file))})
    start = {"down": torch.randn(RANK, width) / width**0.5, "up": torch.zeros(width, RANK), "shift": torch.zeros(width)}
    plan = skipc.Plan(skip, replace={last.name: skipc.LowRank(source, **start)})
    plan = distill(model, plan, [Batch({"input_ids": b}) for b in batches], steps, rate=2e-3)
    save_file(plan.replace[last.name].tensors, file)
    return plan


def train_router(model: LlamaForCausalLM, depth: int, batches: list[torch.Tensor], file: Path) -> torch.nn.Linear:
    """From the stream behind ``depth`` layers: whether a token needs the others, as its likeliest next token would be
    another without them."""
    router = torch.nn.Linear(model.config.hidden_size, 1)
    if file.exists():
        router.load_state_dict(load_file(file))
        return router
    streams, needs = zip(*(exits(model, b, depth) for b in batches), strict=True)
    x, y = torch.cat(streams), torch.cat(needs)
    x = x / x.pow(2).mean(-1, keepdim=True).sqrt()
    optimizer = torch.optim.Adam(router.parameters(), lr=1e-2)
    for step in range(300):
        some = torch.randint(len(x), (4096,), generator=torch.Generator().manual_seed(step))
        loss = F.binary_cross_entropy_with_logits(router(x[some])[:, 0], y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_file(router.state_dict(), file)
    return router


@torch.no_grad()
def exits(model: LlamaForCausalLM, ids: torch.Tensor, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream behind ``depth`` layers, ``[tokens, width]``, and where an exit there would say something else than
    the whole model: 1.0, otherwise 0.0."""
    out = model(ids, output_hidden_states=True)
    stream = out.hidden_states[depth]
    early = model.lm_head(model.model.norm(stream))
    return stream.flatten(0, 1), (early.argmax(-1) != out.logits.argmax(-1)).float().flatten()


# -- what it is worth -------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(model: LlamaForCausalLM, unseen: torch.Tensor, drafts: dict[str, skipc.SelfDraft], new: int = 192) -> None:
    """Print for each draft how often it says what the whole model does, and what time it saves, on text that was not
    trained on."""
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")
    draw = random.Random(0)
    prompts = [drawn(unseen, 1, 64, draw) for _ in range(16)]
    texts = [drawn(unseen, 8, TOKENS, draw) for _ in range(8)]
    truth = [compiled(t).logits.argmax(-1) for t in texts]
    print(f"{'draft':>24} {'agrees':>8} {'accepted':>9} {'plain / speculative':>20} {'tokens a call':>14}")
    for name, draft in drafts.items():
        with compiled.session(plan=draft.plan_for(model)):
            same = [(compiled(t).logits.argmax(-1) == a).float().mean() for t, a in zip(texts, truth, strict=True)]
        ratios, calls, drafted, accepted = [], 0, 0, 0
        for i, prompt in enumerate([*prompts[:2], *prompts]):  # the first two compile
            took = []
            speculation = skipc.Speculation(draft, widths=[4])  # wider calls cost so small a model more than they bring
            for how in (False, speculation):
                begin = time.perf_counter()
                made = skipc.generate(compiled, prompt, max_new_tokens=new, eos_token_id=None, speculative=how)
                took.append((time.perf_counter() - begin, made))
            assert torch.equal(took[0][1], took[1][1])
            if i >= 2:
                ratios.append(took[0][0] / took[1][0])
                calls += sum(speculation.stats.calls.values())
                drafted, accepted = drafted + speculation.stats.drafted, accepted + speculation.stats.accepted
        print(f"{name:>24} {torch.stack(same).mean():>8.1%} {accepted / max(1, drafted):>9.1%} "
              f"{statistics.median(ratios):>20.2f} {new * len(prompts) / calls:>14.2f}", flush=True)  # fmt: skip


@torch.no_grad()
def measure_router(model: LlamaForCausalLM, router: torch.nn.Linear, depth: int, unseen: torch.Tensor) -> None:
    """Print how many tokens a router sends past the layers behind ``depth``, and how many next tokens stay the same."""
    text = drawn(unseen, 8, TOKENS, random.Random(1))
    stream, _ = exits(model, text, depth)
    behind = [s.name for s in skipc.find_sites(model, text[:, :16]).sites if s.layer >= depth]
    compiled = skipc.compile(model, fullgraph=True, on_error="raise")

    def score(stream: torch.Tensor) -> torch.Tensor:
        return router(stream / stream.pow(2).mean(-1, keepdim=True).sqrt()).sigmoid()

    routers: dict[str, Any] = {behind[0]: score, **dict.fromkeys(behind[1:], behind[0])}
    truth = compiled(text).logits.argmax(-1)
    for threshold in (0.2, 0.35, 0.5):
        with compiled.session(policy=skipc.Routed(routers, threshold)):
            same = (compiled(text).logits.argmax(-1) == truth).float().mean()
        left = (score(stream) <= threshold).float().mean()
        print(f"router, threshold {threshold}: {left:.0%} of the tokens leave behind layer {depth}, "
              f"{same:.1%} of the next tokens stay the same")  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--folder", type=Path, default=Path("layerskip"), help="for the model and what is unfinished"
    )
    arguments.add_argument("--minutes", type=float, default=12.0, help="of training, over all runs together")
    arguments.add_argument("--threads", type=int, default=2)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    given.folder.mkdir(parents=True, exist_ok=True)
    seen, unseen = map(tokens_of, sources())
    print(f"{len(seen)} bytes to train on, {len(unseen)} to judge by")
    model = train(new_model(), seen, given.minutes, given.folder)
    model.save_pretrained(given.folder)
    half = model.config.num_hidden_layers // 2
    batches = [drawn(seen, 8, TOKENS, random.Random(-1 - i)) for i in range(40)]
    plan = train_adapter(model, half // 2, batches, given.folder / "exit.safetensors")
    router = train_router(model, half, batches, given.folder / "router.safetensors")
    drafts = {f"{d} of {2 * half} layers": skipc.SelfDraft(depth=d) for d in (1, 2, 3, 4, half)}
    adaptive = skipc.AdaptiveDraft(depth=4)
    drafts |= {f"{half // 2} and the adapter": skipc.SelfDraft(plan), "from 4 on, adaptive": adaptive}
    measure(model, unseen, drafts)
    assert adaptive.current is not None
    print(f"{'which has come to run':>24} {2 * 2 * half - len(adaptive.current.skip)} of {2 * 2 * half} sublayers")
    measure_router(model, router, half, unseen)


if __name__ == "__main__":
    main()
