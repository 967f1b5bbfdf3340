"""SmolLM2 with 8 LoRA adapters of rank 16 on all linear layers, of which each token gets two: chosen once for all of
them (AdaFuse, arXiv 2603.11873) under skipc, beside models that choose in every layer.

Peers, eager: ``MoLA`` (arXiv 2402.08562: each layer routes, and runs each expert on the tokens that chose it),
``LoRAMoE`` (arXiv 2312.09979: each layer routes, and runs all experts on all tokens), ``Gathered`` (each layer routes,
and gathers the matrices that were chosen: no loop). With ``--layers``, the last two are compiled by Inductor, too.

Run: python benchmarks/routed_adapters.py [--dtype bfloat16] [--batch 8] [--layers 4]
"""

from __future__ import annotations

import copy
from typing import Any

import click
import torch
from adapters import LINEARS, Skipc, Step, bank_of, base_model, report, turns
from common import check_load, save
from torch import nn
from torch.nn import functional as F

import skipc
from skipc.adapters.adapter import Adapter, LoRA


class PerLayer(nn.Module):
    """A linear layer with experts, and a router that chooses two of them for each token."""

    def __init__(self, base: nn.Linear, lora: list[LoRA]):
        super().__init__()
        self.base, self.scale, dtype = base, lora[0].scale, base.weight.dtype
        self.a = nn.Parameter(torch.stack([x.a for x in lora]).to(dtype))  # [experts, rank, in]
        self.b = nn.Parameter(torch.stack([x.b for x in lora]).to(dtype))  # [experts, out, rank]
        self.router = nn.Linear(base.in_features, len(lora), bias=False, dtype=dtype)

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Amounts and numbers of the chosen experts, ``[tokens, 2]``."""
        amounts, chosen = F.softmax(self.router(x), dim=-1, dtype=torch.float32).topk(2)
        return (amounts / amounts.sum(-1, keepdim=True)).to(x.dtype), chosen


class MoLA(PerLayer):
    """Each expert runs on the tokens that chose it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        rows, out = x.flatten(0, -2), self.base(x)
        amounts, chosen = self.routed(rows)
        added = torch.zeros_like(out).flatten(0, -2)
        masks = F.one_hot(chosen, len(self.a)).permute(2, 1, 0)
        for e in range(len(self.a)):
            at, tokens = torch.where(masks[e])
            found = F.linear(F.linear(rows[tokens], self.a[e]), self.b[e]) * self.scale
            added.index_add_(0, tokens, found * amounts[tokens, at, None])
        return out + added.view_as(out)


class LoRAMoE(PerLayer):
    """All experts run on all tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        shares = F.softmax(self.router(x), dim=-1, dtype=torch.float32).to(x.dtype)
        out = self.base(x)
        for e in range(len(self.a)):
            out = out + shares[..., e, None] * F.linear(F.linear(x, self.a[e]), self.b[e]) * self.scale
        return out


class Gathered(PerLayer):
    """The matrices of what was chosen are gathered, for all tokens at once."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]``."""
        rows, out = x.flatten(0, -2), self.base(x)
        amounts, chosen = self.routed(rows)
        between = torch.einsum("tkri,ti->tkr", self.a[chosen], rows) * amounts[..., None]
        return out + torch.einsum("tkor,tkr->to", self.b[chosen], between).view_as(out) * self.scale


def experts(model: Any, count: int, rank: int) -> list[Adapter]:
    """Adapters of random numbers."""
    generator = torch.Generator().manual_seed(0)
    layers: list[dict[str, LoRA]] = [{} for _ in range(count)]
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in LINEARS:
            for made in layers:
                a, b = (
                    torch.randn(n, k, generator=generator) * 0.02
                    for n, k in ((rank, module.in_features), (module.out_features, rank))
                )
                made[path] = LoRA(a, b, 2.0)
    return [Adapter(f"a{i}", made) for i, made in enumerate(layers)]


def per_layer(model: Any, kind: type[PerLayer], adapters: list[Adapter]) -> Any:
    """A copy of the model that routes in every layer."""
    made = copy.deepcopy(model)
    for path in adapters[0].layers:
        owner, _, name = path.rpartition(".")
        module = made.get_submodule(owner)
        setattr(module, name, kind(getattr(module, name), [a.layers[path] for a in adapters]))
    return made.eval()


@click.command()
@click.option("--rounds", default=20, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--batch", default=1, show_default=True)
@click.option("--layers", default=0, help="Only the first so many; then peers under Inductor, too.")
@click.option("--rank", default=16, show_default=True)
@click.option("--count", default=8, show_default=True, help="Experts.")
@click.option("--json", "path", help="Write the figures here.")
@torch.no_grad()
def main(
    rounds: int, threads: int, dtype: str, batch: int, layers: int, rank: int, count: int, path: str | None
) -> None:
    """Compare decode steps of routed adapters."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = base_model(dtype, layers)
    adapters = experts(model, count, rank)
    bank = bank_of(model, adapters, rank)
    router = skipc.AdapterRouter(torch.randn(count, model.config.hidden_size), [a.name for a in adapters])
    load = check_load()
    compiled = skipc.compile(model, adapters=bank, fullgraph=True, on_error="raise")
    peers: dict[str, Any] = {
        "none": Skipc(compiled, batch),
        "two for all": Skipc(compiled, batch, {"a0": 0.5, "a1": 0.5}),
        "routed": Skipc(compiled, batch, router),
    }
    record: dict[str, Any] = {"dtype": dtype, "batch": batch, "layers": layers, "rank": rank, "load": load}
    title = f"{dtype}, batch {batch}, 2 of {count} adapters of rank {rank} for each token, {threads} threads"
    record["steps"] = report(title, turns(peers, rounds), "none")
    others: dict[str, Any] = {"routed": peers["routed"]}
    for kind in (MoLA, LoRAMoE, Gathered):
        peer = per_layer(model, kind, adapters)
        others[kind.__name__] = Step(peer, peer, batch)
        if layers and kind is not MoLA:  # whose sizes depend on what was chosen
            others[f"{kind.__name__} under Inductor"] = step = Step(peer, torch.compile(peer), batch)
            for _ in range(3):
                step()
    record["peers"] = report(title, turns(others, max(3, rounds // 4)), "routed")
    save(path, record)


if __name__ == "__main__":
    main()
