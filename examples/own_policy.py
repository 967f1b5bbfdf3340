"""Policies of one's own: one that skips the MLPs of the upper half in each other decode step, and one that reacts to
how much the stream changes.

Run: python examples/own_policy.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import skipc


class EveryOtherStep(skipc.Policy):
    """Asked before each call, it returns the call's gates. What it remembers belongs to one session."""

    only_grows = True  # it skips no attention, so no cache can get holes

    def reset(self) -> None:
        self.steps = 0

    def decide(self, call: skipc.Call) -> skipc.GateTable:
        depth = max(site.layer for site in call.sites) + 1
        upper = [site.name for site in call.sites if site.kind == "mlp" and site.layer >= depth // 2]
        odd = call.phase == "decode" and self.steps % 2 == 1
        return skipc.GateTable.of(call.names, skip=upper if odd else ())

    def observe(self, call, seen) -> None:
        self.steps += call.phase == "decode"


class Saturated(skipc.Policy):
    """Decided while the call runs: once an MLP changes the stream by little, the MLPs behind it are skipped."""

    only_grows = True

    def decide(self, call: skipc.Call) -> skipc.GateTable:
        mlps = [site.name for site in call.sites if site.kind == "mlp"]
        closes = {name: mlps[i + 1 :] for i, name in enumerate(mlps)}
        return skipc.GateTable.of(call.names, threshold=dict.fromkeys(mlps, 0.99), closes=closes, rule="mean")


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=128)
    ).eval()
    prompt = torch.randint(3, 120, (1, 8))
    compiled = skipc.compile(model)
    for policy in (EveryOtherStep(), Saturated()):
        with compiled.session(policy=policy, record=True) as session:
            skipc.generate(compiled, prompt, max_new_tokens=8)
        skipped = [len(step.skipped) for step in session.route.steps]
        print(f"{type(policy).__name__}: sites skipped in each call {skipped}, route {session.route.digest()}")
        with compiled.session(route=session.route):  # the same actions again
            skipc.generate(compiled, prompt, max_new_tokens=8)


if __name__ == "__main__":
    main()
