"""What to do with which sites, for so many seconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from skipc.ir.errors import PlanError
from skipc.ir.plan import SKIP, Action

_HALVINGS = 80


@dataclass(frozen=True)
class Option:
    """One way to run a site.

    Attributes:
        action: that it is.
        loss: nats per token that it costs, as far as one can tell from this site alone.
        seconds: that it saves in each call.
    """

    action: Action
    loss: float
    seconds: float


def choose(
    options: Mapping[str, Sequence[Option]],
    seconds: float,
    most_in_a_row: int | None = None,
) -> dict[str, Option]:
    """For each site one of its options, so that together they save ``seconds`` or slightly more at the least loss.

    Losses are taken to add up. Each site takes the option that is cheapest at one price for a second, which is the
    lowest at which enough is saved (Lagrange's multiplier; Everett 1963); then what is saved beyond need is given
    back where that helps most.

    Args:
        options: by site, in order of execution: all the ways to run it.
        seconds: to be saved.
        most_in_a_row: sites next to each other that may be left out.

    Raises:
        PlanError: if the options cannot save so much.
    """
    ways = {site: list(given) for site, given in options.items()}
    while True:
        chosen = _cheapest(ways, seconds)
        run = _too_long(chosen, most_in_a_row)
        if not run:
            return _given_back(ways, chosen, seconds)
        worst = max(run, key=lambda site: chosen[site].loss / max(chosen[site].seconds, 1e-12))
        ways[worst] = [o for o in ways[worst] if o.action != SKIP]


def _cheapest(ways: Mapping[str, Sequence[Option]], seconds: float) -> dict[str, Option]:
    def at(price: float) -> dict[str, Option]:
        return {site: min(given, key=lambda o: o.loss - price * o.seconds) for site, given in ways.items()}

    most = sum(max(o.seconds for o in given) for given in ways.values())
    if most < seconds:
        raise PlanError(f"these sites can save {most * 1e3:.2f} ms of a call, not {seconds * 1e3:.2f}")
    low, high = 0.0, 1.0
    while saved(at(high).values()) < seconds:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if saved(at(middle).values()) >= seconds else (middle, high)
    return at(high)


def _given_back(ways: Mapping[str, Sequence[Option]], chosen: dict[str, Option], seconds: float) -> dict[str, Option]:
    while True:
        spare = saved(chosen.values()) - seconds
        swaps = [
            (chosen[site].loss - o.loss, site, o)
            for site, given in ways.items()
            for o in given
            if o.loss < chosen[site].loss and chosen[site].seconds - o.seconds <= spare
        ]
        if not swaps:
            return chosen
        _, site, option = max(swaps, key=lambda swap: swap[0])
        chosen = {**chosen, site: option}


def saved(options: Iterable[Option]) -> float:
    """Seconds that they save together."""
    return sum(o.seconds for o in options)


def _too_long(chosen: Mapping[str, Option], most: int | None) -> list[str]:
    """The first stretch of more than ``most`` sites that are left out."""
    run: list[str] = []
    for site, option in chosen.items():
        run = [*run, site] if option.action == SKIP else []
        if most is not None and len(run) > most:
            return run
    return []
