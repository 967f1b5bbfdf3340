"""``skipc.find_draft``: which sublayers to leave out, so that the rest of a model drafts most tokens in a second."""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from skipc.calibration.costs import Regime
from skipc.calibration.planning import Option, choose
from skipc.calibration.text import english_text, token_windows
from skipc.calibration.timing import time_calls
from skipc.ir.errors import PlanError
from skipc.ir.plan import RUN, SKIP, Plan
from skipc.ir.site import Site
from skipc.kernels.device import wait_for
from skipc.model import CompiledModel
from skipc.runtime.decoder import Decoder, cache_length
from skipc.runtime.sessions import sites_of
from skipc.runtime.speculation.adaptive import changed
from skipc.runtime.speculation.pace import promise
from skipc.runtime.speculation.self_draft import SelfDraft
from skipc.runtime.speculation.settings import Speculation

_WINDOW = 32  # tokens of each row that drafts are compared on
_SAVED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # shares of the sublayers' time
_TIMED = 3  # candidates
_ROUNDS = 12  # of timing


@dataclass(frozen=True)
class FoundDraft:
    """A plan to draft with, and what that promises.

    Attributes:
        plan: what it leaves out.
        agreement: share of the model's own tokens that it would have said, too.
        cost: of a drafted token, in plain steps.
        length: of drafts, at best.
        promise: tokens in the time of a plain step, if tokens are right or wrong by chance. Below 1 it does not pay.
    """

    plan: Plan
    agreement: float
    cost: float
    length: int
    promise: float

    @property
    def draft(self) -> SelfDraft:
        """For :class:`skipc.Speculation`."""
        return SelfDraft(self.plan)

    def __str__(self) -> str:
        return (
            f"{len(self.plan.skip)} sites left out: {self.agreement:.0%} of the tokens, each in {self.cost:.2f} of a "
            f"step, {self.length} at a time promise {self.promise:.2f}x"
        )


@torch.no_grad()
def find_draft(
    compiled: CompiledModel,
    prompts: torch.Tensor | None = None,
    *,
    tokenizer: object = None,
    plans: Iterable[Plan] = (),
    batch: int = 1,
    context: int = 256,
    trials: int = 64,
    seed: int = 0,
) -> list[FoundDraft]:
    """Drafts for ``skipc.generate(..., speculative=skipc.Speculation(found[0].draft))``, the best first.

    Plans are compared as drafts are (SWIFT, arXiv 2410.06916): behind what the whole model has read, on tokens that it
    said itself. Candidates are early exits at each depth, ``plans``, and those that the planner makes of what each
    sublayer costs and changes; the best is then changed by a layer, a sublayer or two at a time, and what promises more
    is kept (a search by chance instead of the Bayesian one of Draft & Verify, arXiv 2309.08168, since a trial takes a
    tenth of a second here). Nothing is compiled for a candidate, unless it brings weights.

    Args:
        compiled: what :func:`skipc.compile` made of a Hugging Face decoder.
        prompts: int64 ``[rows, tokens]``, like those that it is for. None: English that comes with Python.
        tokenizer: for the default text.
        plans: more candidates.
        batch: rows of the requests that drafts are for.
        context: tokens that those have, about.
        trials: changes to try.
        seed: of the changes.

    Raises:
        PlanError: if the model has no sites, or a cache that slides, from which no tokens can be taken back.
        TypeError: without prompts and tokenizer.
    """
    if prompts is None:
        if tokenizer is None:
            raise TypeError("give prompts, or a tokenizer for the English text that comes with Python")
        prompts = torch.cat(token_windows(tokenizer, english_text(), 128, 8))
    prompts = prompts.to(next(compiled.model.parameters()).device)
    trial = _Trial(compiled, prompts)
    sites = sites_of(compiled.model)
    if not sites:
        raise PlanError("the model has no sublayers that could be left out")
    times = _Times(compiled, batch, context, prompts)
    alone = {site.name: trial.agreement(_drafting(Plan([site.name]))) for site in sites}
    made = [*map(_drafting, plans), *_exits(sites), *_planned(sites, alone, times.seconds)]
    found = [times.judge(plan, trial.agreement(plan)) for plan in made]
    draw, best = random.Random(seed), max(found, key=lambda f: f.promise)
    for _ in range(trials):
        plan = changed(best.plan, sites, draw)
        found.append(times.judge(plan, trial.agreement(plan)))
        best = max(best, found[-1], key=lambda f: f.promise)
    unlike = {f.plan.key: f for f in sorted(found, key=lambda f: f.promise)}
    found = sorted(unlike.values(), key=lambda f: -f.promise)
    timed = times.measured(found[:_TIMED])
    return sorted(timed, key=lambda f: -f.promise) + found[_TIMED:]


class _Trial:
    """Rows that the whole model has read and gone on with, on which plans are compared with it."""

    def __init__(self, compiled: CompiledModel, prompts: torch.Tensor):
        rows, tokens = prompts.shape
        self.compiled = compiled
        self.decoder = Decoder(compiled.model, compiled, rows, cache_length(tokens + _WINDOW + 1), padded=False)
        if not self.decoder.rewinds:
            raise PlanError("the model's cache slides, so that drafted tokens could not be taken back")
        said = [self.decoder.prefill(prompts, None).argmax(-1)]
        with self.decoder.ahead():
            for _ in range(_WINDOW):
                said.append(self.decoder.decode(said[-1], watched=False).argmax(-1))
        self.said = torch.stack(said, 1)

    def agreement(self, plan: Plan) -> float:
        """How many of the whole model's tokens come next under a plan, too."""
        with self.compiled.session(plan=plan), self.decoder.ahead():
            found = self.decoder.judge(self.said[:, :-1]).argmax(-1)
        return (found == self.said[:, 1:]).float().mean().item()


class _Times:
    """What calls take in plain steps."""

    def __init__(self, compiled: CompiledModel, batch: int, context: int, prompts: torch.Tensor):
        self.compiled, self.regime = compiled, Regime("decode", batch, 1, context)
        self.widths = Speculation().widths_for(batch, compiled.model)
        row = prompts[:1].expand(batch, -1).contiguous()
        with compiled.session(measure=True) as session:
            decoder = Decoder(compiled.model, compiled, batch, cache_length(context + max(self.widths)), padded=False)
            decoder.fix_sizes()
            decoder.prefill(row[:, :context], None)
            for _ in range(_ROUNDS):
                decoder.decode(row[:, 0])
        seconds = session.stats().seconds
        self._calls = _by_width(decoder, row, self.widths)
        # Timed sites are not chained to each other, and take longer: what all of them take together is measured.
        with compiled.session(plan=_drafting(Plan(seconds))):
            rest = _by_width(decoder, row, (1,))[1]
        share = max(0.0, self._calls[1] - rest) / sum(seconds.values())
        self.seconds = Counter({name: share * taken for name, taken in seconds.items()})

    def judging(self, count: int) -> float:
        """A call of the whole model that judges so many drafted tokens of each row."""
        return next((self._calls[w] for w in self.widths if w > count), float("inf")) / self._calls[1]

    def judge(self, plan: Plan, agreement: float, cost: float | None = None) -> FoundDraft:
        """What a plan promises; its cost is what its sites take, if it was not measured."""
        if cost is None:
            cost = max(0.05, 1 - sum(self.seconds[s] for s in (*plan.skip, *plan.replace)) / self._calls[1])
        promised, length = promise(agreement, cost, self.judging, max(self.widths))
        return FoundDraft(plan, agreement, cost, length, promised)

    def measured(self, found: Sequence[FoundDraft]) -> list[FoundDraft]:
        """The same by the clock."""
        plans = {str(i): f.plan for i, f in enumerate(found)}
        took = time_calls(self.compiled, self.regime, {"whole": None, **plans}, _ROUNDS)
        whole, *each = (statistics.median(t) for t in took.values())
        return [self.judge(f.plan, f.agreement, seconds / whole) for f, seconds in zip(found, each, strict=True)]


def _by_width(decoder: Decoder, row: torch.Tensor, widths: Sequence[int]) -> dict[int, float]:
    """Seconds of calls of the whole model, by tokens of each row, in turns."""
    times: dict[int, list[float]] = {w: [] for w in widths}
    wait = wait_for(row.device)
    for i in range(_ROUNDS + 3):
        for width in widths:
            with decoder.ahead():
                wait()
                begin = time.perf_counter()
                decoder.judge(row[:, :1].expand(-1, width), watched=False)
                wait()
                if i >= 3:
                    times[width].append(time.perf_counter() - begin)
    return {w: statistics.median(t) for w, t in times.items()}


def _drafting(plan: Plan) -> Plan:
    """As a draft runs it: what attentions that it leaves out would write is never read."""
    return Plan(plan.skip, plan.weights, plan.expected, "none", plan.replace)


def _exits(sites: Sequence[Site]) -> Iterator[Plan]:
    """Early exits, but for the first layer and the last."""
    for depth in range(1, max(s.layer for s in sites) + 1):
        yield _drafting(Plan(s.name for s in sites if s.layer >= depth))


def _planned(sites: Sequence[Site], alone: Mapping[str, float], seconds: Mapping[str, float]) -> Iterator[Plan]:
    """Those that save more and more time and change the least, as far as single sublayers tell."""
    options = {
        s.name: [Option(RUN, 0.0, 0.0), Option(SKIP, max(0.0, 1 - alone[s.name]), seconds[s.name])] for s in sites
    }
    total = sum(seconds.values())
    for share in _SAVED:
        chosen = choose(options, share * total * 0.999)
        yield _drafting(Plan(name for name, option in chosen.items() if option.action == SKIP))
