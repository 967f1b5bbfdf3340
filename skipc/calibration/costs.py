"""What a plan's calls take: work of each site, symbolic in the sizes of a call, fitted to measured times."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from skipc.calibration.batches import Batch
from skipc.dynamo import compile_isolated
from skipc.ir.config import Config
from skipc.ir.plan import RUN, Action
from skipc.passes.base import PassContext
from skipc.passes.manager import PassManager
from skipc.passes.site_work import BATCH, CONTEXT, TOKENS, Work, site_work
from skipc.runtime.policies.base import Phase

_SWEEPS = 20_000


@dataclass(frozen=True)
class Regime:
    """The sizes of a call.

    Attributes:
        phase: ``decode``, one token for each row; or ``prefill``, which is any call of an encoder, too.
        batch: rows.
        tokens: in each row of the call.
        context: tokens that are attended to, those of the call included.
    """

    phase: Phase = "decode"
    batch: int = 1
    tokens: int = 1
    context: int = 256

    def __str__(self) -> str:
        rows = f"batch {self.batch}, " if self.batch > 1 else ""
        return f"{self.phase}, {rows}" + (
            f"context {self.context}" if self.phase == "decode" else f"{self.tokens} tokens"
        )


@dataclass(frozen=True)
class Timing:
    """Median seconds of a call in which sites do ``actions``; those not named run as they are."""

    regime: Regime
    actions: Mapping[str, Action]
    seconds: float

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Timing:
        """From plain data."""
        return cls(Regime(**record["regime"]), actions_of(record["actions"]), record["seconds"])


def actions_of(record: Mapping[str, Any]) -> dict[str, Action]:
    """Actions by site, from plain data."""
    return {site: Action(**action) for site, action in record.items()}


@torch.no_grad()
def trace_work(model: torch.nn.Module, batch: Batch) -> dict[str, Work]:
    """The work of each site of ``model``, from the graph of a call like ``batch``, with rows and tokens left open."""
    found: dict[str, Work] = {}

    def capture(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        manager = PassManager(PassContext(Config()))
        manager.run(gm)
        assert manager.ctx.streams is not None
        found.update(site_work(manager.ctx.streams))
        return gm.forward

    inputs = dict(batch.inputs)
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            value = value if value.shape[0] > 1 else value.repeat(2, *[1] * (value.dim() - 1))
            torch._dynamo.maybe_mark_dynamic(value, 0)
            if value.dim() == 2 or (value.dim() == 3 and value.is_floating_point()):
                torch._dynamo.maybe_mark_dynamic(value, 1)
            inputs[name] = value
    compile_isolated(model, backend=capture)(**inputs)
    return found


class CostModel:
    """Seconds of a call, from its sites' work.

    A call takes something for itself, for each token and for each site that runs, and then the time of its bytes and
    operations: of weights, of cached keys and values, of products with weights and of attention. What each of them
    takes is fitted for each phase, by least squares of relative errors, none of them negative. Replacements are a kind
    of site of their own.

    Args:
        work: by site.
        kinds: kinds of sites, each of which has an overhead of its own.
        size: bytes of a number.
    """

    def __init__(self, work: Mapping[str, Work], kinds: Mapping[str, str], size: int):
        self.work, self.kinds, self.size = dict(work), dict(kinds), size
        self.names = ["call", "token", *(f"overhead of {k}" for k in (*sorted(set(kinds.values())), "replacement")),
                      "weights", "cache", "products", "attention"]  # fmt: skip
        self.coefficients: dict[str, dict[str, float]] = {}
        self._compiled = {
            name: sympy.lambdify((BATCH, TOKENS, CONTEXT), [w.products, w.attention, w.cached], "math")
            for name, w in self.work.items()
        }

    def fit(self, timings: Sequence[Timing]) -> None:
        """Fit to measured calls. Phases without any are left out."""
        for phase in sorted({t.regime.phase for t in timings}):
            own = [t for t in timings if t.regime.phase == phase]
            rows = torch.tensor([self._features(t.regime, t.actions) for t in own], dtype=torch.float64)
            seconds = torch.tensor([t.seconds for t in own], dtype=torch.float64)
            found = nonnegative_least_squares(rows / seconds[:, None], torch.ones(len(own), dtype=torch.float64))
            self.coefficients[phase] = dict(zip(self.names, found.tolist(), strict=True))

    def seconds(self, regime: Regime, actions: Mapping[str, Action] | None = None) -> float:
        """What a call takes.

        Raises:
            KeyError: if no call of this phase was measured.
        """
        weights = self.coefficients[regime.phase]
        return sum(weights[n] * f for n, f in zip(self.names, self._features(regime, actions or {}), strict=True))

    def of_site(self, regime: Regime, site: str, action: Action = RUN) -> float:
        """What a site takes of a call if it does ``action``."""
        weights = self.coefficients[regime.phase]
        values = self._of_site(regime, site, action)
        return sum(weights[n] * f for n, f in zip(self.names, values, strict=True))

    def error(self, timings: Sequence[Timing]) -> float:
        """The largest relative error in predicting some measured calls."""
        return max(abs(self.seconds(t.regime, t.actions) / t.seconds - 1) for t in timings)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        work = {
            n: [w.weights, str(w.products), str(w.attention), str(w.cached), w.width, w.neurons]
            for n, w in self.work.items()
        }
        return {"work": work, "kinds": self.kinds, "size": self.size, "coefficients": self.coefficients}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> CostModel:
        """What :meth:`to_dict` made. Expressions are polynomials in B, T and C."""
        work = {n: Work(w[0], *map(_polynomial, w[1:4]), *w[4:]) for n, w in record["work"].items()}
        made = cls(work, record["kinds"], record["size"])
        made.coefficients = record["coefficients"]
        return made

    def _features(self, regime: Regime, actions: Mapping[str, Action]) -> list[float]:
        total = [1.0, float(regime.batch * regime.tokens)] + [0.0] * (len(self.names) - 2)
        for site in self.work:
            total = [a + b for a, b in zip(total, self._of_site(regime, site, actions.get(site, RUN)), strict=True)]
        return total

    def _of_site(self, regime: Regime, site: str, action: Action) -> list[float]:
        values, work = dict.fromkeys(self.names, 0.0), self.work[site]
        if action.kind in ("run", "thin"):
            share = action.size / work.neurons if action.kind == "thin" else 1.0
            products, attention, cached = self._compiled[site](regime.batch, regime.tokens, regime.context)
            values[f"overhead of {self.kinds[site]}"] = 1.0
            values["weights"] = work.weights * self.size * share
            values["products"] = float(products) * share
            values["attention"], values["cache"] = float(attention) * share, float(cached) * self.size * share
        elif action.kind != "skip":
            numbers = (2 * action.size + 1) * work.width
            values["overhead of replacement"] = 1.0
            values["weights"] = numbers * self.size
            values["products"] = 2.0 * numbers * regime.batch * regime.tokens
        return list(values.values())


def _polynomial(text: str) -> sympy.Expr:
    """A polynomial in B, T and C from its text, without evaluating what else the text might be."""
    if not re.fullmatch(r"[BTC0-9*+/ ]*", text):
        raise ValueError(f"{text!r} is no polynomial in B, T and C")
    return sympy.sympify(text, locals={str(s): s for s in (BATCH, TOKENS, CONTEXT)})


def nonnegative_least_squares(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The ``x >= 0`` with the least ``|a x - b|``: fp64 ``[rows, columns]`` and ``[rows]``, by coordinate descent. Of
    columns that say the same, all take their share."""
    scale = a.norm(dim=0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    unit = a / scale
    gram, right = unit.T @ unit, unit.T @ b
    gram = gram + torch.eye(len(gram), dtype=gram.dtype) * 1e-9
    x = torch.zeros_like(right)
    for _ in range(_SWEEPS):
        before = x.clone()
        for i in range(len(x)):
            x[i] = (x[i] + (right[i] - gram[i] @ x) / gram[i, i]).clamp(min=0)
        if float((x - before).abs().max()) < 1e-12:
            break
    return x / scale
