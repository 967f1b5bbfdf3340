"""Gates that are decided on the device: the host launches all steps, and reads what was skipped once, behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from skipc.kernels.similarity import RULE_CODES

from skipc.ir.gating import BATCH_RULES, GateTable
from skipc.ir.program import Input, KernelCall

if TYPE_CHECKING:
    from skipc.runtime.gating import GatedSpec


class DeviceGates:
    """A gate table on the device.

    Attributes:
        steps: numbers of the steps whose kernels look at it.
        skip: int8 ``[sites]``: what a call skips from its start, not zero.
    """

    def __init__(self, table: GateTable, device: torch.device, kernels: dict[int, tuple[int, KernelCall]]):
        self.table, self.steps = table, frozenset(kernels)
        self._kernels = kernels  # by step: the number of its site, and its kernel
        self.skip, self._closes = (t.to(device, torch.int8) for t in (table.skip, table.closes))
        self._threshold = table.threshold.tolist()

    @classmethod
    def of(cls, plan: GatedSpec, table: GateTable, device: torch.device, adapted: bool) -> DeviceGates | None:
        """None if sites have a part in the decisions of the call that have no such kernels. ``adapted``: somebody may
        want adapters."""
        if table.by_token or table.spans or table.rule not in BATCH_RULES:
            return None
        closed = table.closes[sorted(table.deciding)].any(0).nonzero().flatten().tolist()
        kernels: dict[int, tuple[int, KernelCall]] = {}
        for i, (step, sites) in enumerate(zip(plan.spec.steps, plan.sites, strict=True)):
            region = step.arms[0].region
            call = plan.spec.regions[region].predicated if region is not None else None
            if call is None or len(sites) != 1 or (adapted and call.arguments[-1]):
                continue
            if sites[0] in table.deciding or sites[0] in closed:
                kernels[i] = sites[0], call
        reached = {site for site, _ in kernels.values()}
        # Moments have one size: of the last stream, whose tokens a call counts.
        if any(plan.spec.sites[site].stream != plan.spec.sites[-1].stream for site in reached):
            return None
        if not reached.issuperset((*table.deciding, *closed)) or reached.intersection(table.factors_by_number):
            return None
        return cls(table, device, kernels)

    def run(self, step: int, inputs: Sequence[Any], skipped: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The stream behind a step, whether it is skipped or not.

        Args:
            skipped: int8 ``[sites]`` of the call, not zero where it skips; what the step decides is added.
            rows: moments of the call, fp32 ``[sites, rows, 3]``; written where the step runs.
        """
        from skipc.kernels.gpu.gates import Gate  # imports Triton
        from skipc.kernels.gpu.mlp import mlp

        site, call = self._kernels[step]
        x, norm, eps, gate, up, down, activation, residual, _ = (
            inputs[a.index] if isinstance(a, Input) else a for a in call.arguments
        )
        if up is None:
            gate, up = gate.chunk(2)
        decides = site in self.table.deciding
        moments, closes = rows[site] if decides or self.table.measures else None, self._closes[site]
        threshold, rule = self._threshold[site], RULE_CODES[self.table.rule]
        told = Gate(skipped, site, moments, closes if decides else None, threshold, rule)
        flat = x.view(-1, x.shape[-1])
        made = mlp(flat, gate, up, down, activation, norm, eps, None, residual.view(len(flat), -1), gate=told)
        return made.view_as(residual)
