"""Times of real calls, plans taking turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from skipc.calibration.batches import Batch
from skipc.calibration.costs import Regime
from skipc.ir.plan import Plan
from skipc.model import CompiledModel

_BURST = 6  # decode steps in a row, of which the first finds another plan's weights in the caches


@torch.no_grad()
def time_calls(
    compiled: CompiledModel,
    regime: Regime,
    plans: Mapping[str, Plan | None],
    rounds: int,
    example: Batch | None = None,
) -> dict[str, list[float]]:
    """Seconds of calls of ``regime`` under each plan, None being exact mode: plans take turns, so that the machine's
    drift hits all alike. What has to be compiled is compiled first.

    Args:
        example: for a prefill, a call whose inputs are cut or repeated to the regime's sizes.
    """
    call, before, count = _decoding(compiled, regime) if regime.phase == "decode" else _call(compiled, regime, example)
    times: dict[str, list[float]] = {name: [] for name in plans}
    for i in range(rounds + 2):
        for name, plan in plans.items():
            with compiled.session(plan=plan) if plan is not None else nullcontext():
                for j in range(count):
                    before()
                    _wait(compiled)
                    start = time.perf_counter()
                    call()
                    _wait(compiled)
                    if i >= 2 and (j > 0 or count == 1):
                        times[name].append(time.perf_counter() - start)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """Median seconds of each plan."""
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _decoding(compiled: CompiledModel, regime: Regime) -> tuple[Callable[[], Any], Callable[[], None], int]:
    from skipc.runtime.generation import Decoder, cache_length

    model = compiled.model
    decoder = Decoder(model, compiled, regime.batch, cache_length(regime.context + _BURST), padded=False)
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


def _call(
    compiled: CompiledModel, regime: Regime, example: Batch | None
) -> tuple[Callable[[], Any], Callable[[], None], int]:
    assert example is not None
    inputs = {}
    for name, value in example.inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            value = value.repeat(-(-regime.batch // value.shape[0]), *[1] * (value.dim() - 1))[: regime.batch]
            if value.dim() == 2 and not value.is_floating_point():
                value = value.repeat(1, -(-regime.tokens // value.shape[1]))[:, : regime.tokens].contiguous()
        inputs[name] = value
    return lambda: compiled(**inputs), lambda: None, 1


def _wait(compiled: CompiledModel) -> None:
    if next(compiled.model.parameters()).is_cuda:
        torch.cuda.synchronize()
