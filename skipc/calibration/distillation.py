"""A short training of a plan's weights against the whole model (knowledge distillation, Hinton et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from skipc.calibration.batches import Batch, call_on, device_of, in_half, own_rows, result_of
from skipc.calibration.kept_memory import kept_memory
from skipc.ir.errors import PlanError
from skipc.ir.plan import Plan

_WARM = 0.1  # of the steps, in which the rate rises
_LAST = 0.05  # of the rate, at the end
_ROWS = 16  # of logits at a time


@kept_memory()
def distill(
    model: torch.nn.Module,
    plan: Plan,
    batches: Sequence[Batch],
    steps: int,
    rate: float = 2e-4,
    seed: int = 0,
    progress: Any = None,
) -> Plan:
    """A plan of the same shapes whose results are nearer to the model's. Only the plan's weights are trained.

    Args:
        model: in evaluation mode; left as it is.
        batches: in random order, again and again.
        steps: batches to train on.
        rate: learning rate of Adam, which rises over a tenth of the steps and then falls along a cosine.
        progress: wraps an iterable, as ``tqdm`` or ``rich`` do.

    Raises:
        PlanError: if the plan has no weights.
    """
    start = {name: value.detach() for name, value in plan.trained.items()}
    if not start:
        raise PlanError("the plan has no weights to train")
    dtype = next(model.parameters()).dtype
    weights = {name: value.float().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in progress(range(steps)) if progress else range(steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        batch = batches[order.pop()]
        with in_half(device_of(model)):
            with torch.no_grad():
                truth = call_on(model, batch)
            with torch.enable_grad():
                student = plan.with_tensors({n: v.to(dtype) for n, v in weights.items()})
                loss = divergence(truth, call_on(model, batch, student, frozen=True), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        schedule.step()
    return plan.with_tensors({name: value.detach().to(dtype) for name, value in weights.items()})


def divergence(truth: Any, found: Any, batch: Batch) -> torch.Tensor:
    """How far a model's results are from the truth, mean over valid tokens: the Kullback-Leibler divergence of its
    distribution of the next token, in nats; of hidden states, their squared distance, relative to the truth's."""
    a, b = own_rows(result_of(truth), batch), own_rows(result_of(found), batch)
    if isinstance(getattr(truth, "logits", None), torch.Tensor):
        return _Divergence.apply(b, a)
    a, b = a.float(), b.float()
    return (a - b).pow(2).sum() / a.pow(2).sum()


class _Divergence(torch.autograd.Function):
    """Mean of rows' KL(truth || found), from logits. Some rows at a time, which stay in the cache, where torch's own
    operations would each go through memory for all of ``[tokens, vocabulary]`` in fp32."""

    @staticmethod
    def forward(ctx: Any, found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        slope = torch.empty_like(found)
        sums = []
        for b, a, s in zip(found.split(_ROWS), truth.split(_ROWS), slope.split(_ROWS), strict=True):
            log_b, log_a = b.float().log_softmax(-1), a.float().log_softmax(-1)
            share = log_a.exp()
            sums.append(log_a.sub_(log_b).mul_(share).sum())
            s.copy_(log_b.exp_().sub_(share))
        ctx.save_for_backward(slope)
        return torch.stack(sums).sum() / len(found)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return slope * (grad / len(slope)), None


def _share(step: int, steps: int) -> float:
    warm = max(1, round(_WARM * steps))
    if step < warm:
        return (step + 1) / warm
    return _LAST + (1 - _LAST) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
