"""Times of real calls, plans taking turns."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from skipc.calibration.batches import Batch
from skipc.calibration.costs import Regime
from skipc.ir.plan import Plan
from skipc.kernels.device import wait_for
from skipc.model import CompiledModel

_BURST = 6  # decode steps in a row, of which the first finds another plan's weights in the caches


@dataclass(frozen=True)
class Peer:
    """A way to run a model: a callable, and for one of skipc's the plan to run under, None being none."""

    call: Any
    plan: Plan | None = None


def time_calls(
    compiled: CompiledModel,
    regime: Regime,
    plans: Mapping[str, Plan | None],
    rounds: int,
    example: Batch | None = None,
) -> dict[str, list[float]]:
    """:func:`time_peers` of one compiled model under different plans, None being exact mode."""
    return time_peers(compiled.model, regime, {n: Peer(compiled, p) for n, p in plans.items()}, rounds, example)


@torch.no_grad()
def time_peers(
    model: torch.nn.Module,
    regime: Regime,
    peers: Mapping[str, Peer],
    rounds: int,
    example: Batch | None = None,
) -> dict[str, list[float]]:
    """Seconds of calls of ``regime``. Peers take turns, so that the machine's drift hits all alike. What has to be
    compiled is compiled first.

    Args:
        example: for a prefill, a call whose inputs are cut or repeated to the regime's sizes.
    """
    ready: dict[int, tuple[Callable[[], Any], Callable[[], None], int]] = {}
    for peer in peers.values():
        if id(peer.call) not in ready:
            decodes = regime.phase == "decode"
            ready[id(peer.call)] = (_decoding if decodes else _calling)(model, peer.call, regime, example)
    wait = wait_for(next(model.parameters()).device)
    times: dict[str, list[float]] = {name: [] for name in peers}
    for i in range(rounds + 2):
        for name, peer in peers.items():
            call, before, count = ready[id(peer.call)]
            with peer.call.session(plan=peer.plan) if peer.plan is not None else nullcontext():
                for j in range(count):
                    before()
                    wait()
                    start = time.perf_counter()
                    call()
                    wait()
                    if i >= 2 and (j > 0 or count == 1):
                        times[name].append(time.perf_counter() - start)
    return times


def ratio(a: Sequence[float], b: Sequence[float], resamples: int = 2000) -> tuple[float, float, float]:
    """Median of ``a`` over median of ``b``, with a bootstrap 95 % interval over rounds."""
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(x), (resamples, len(x)), generator=generator)
    drawn = x[index].median(dim=1).values / y[index].median(dim=1).values
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return statistics.median(a) / statistics.median(b), low, high


def _decoding(
    model: Any, call: Any, regime: Regime, example: Batch | None
) -> tuple[Callable[[], Any], Callable[[], None], int]:
    from skipc.runtime.decoder import Decoder, cache_length

    decoder = Decoder(model, call, regime.batch, cache_length(regime.context + _BURST), padded=False)
    decoder.fix_sizes()
    device = next(model.parameters()).device
    token = torch.full((regime.batch,), 35, device=device)
    counted = all(hasattr(layer, "cumulative_length") for layer in decoder.cache.layers)
    prompt = torch.full((regime.batch, regime.context - 1), 35, device=device)

    def rewind() -> None:
        if counted:
            for layer in decoder.cache.layers:
                layer.cumulative_length.fill_(regime.context - 1)
        else:
            decoder.prefill(prompt, None)

    return lambda: decoder.decode(token, watched=False), rewind, _BURST


def _calling(
    model: Any, call: Any, regime: Regime, example: Batch | None
) -> tuple[Callable[[], Any], Callable[[], None], int]:
    assert example is not None
    inputs = {}
    for name, value in example.inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            value = value.repeat(-(-regime.batch // value.shape[0]), *[1] * (value.dim() - 1))[: regime.batch]
            if value.dim() == 2 and not value.is_floating_point():
                value = value.repeat(1, -(-regime.tokens // value.shape[1]))[:, : regime.tokens].contiguous()
        inputs[name] = value
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1  # as prefills have it
    return lambda: call(**inputs), lambda: None, 1
