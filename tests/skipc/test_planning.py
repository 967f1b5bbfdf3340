"""Choosing options under a budget, against all combinations."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skipc
from skipc.calibration.planning import Option, choose, saved
from skipc.ir.plan import RUN, SKIP, Action

_WHOLE = Option(RUN, 0.0, 0.0)


def site(*points: tuple[float, float]) -> list[Option]:
    """Options with growing savings."""
    ways = [Action("thin", i + 1) for i in range(len(points) - 1)] + [SKIP]
    return [_WHOLE, *(Option(way, loss, s) for way, (loss, s) in zip(ways, points, strict=True))]


_point = st.tuples(st.floats(0, 10), st.floats(0.01, 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(_point, min_size=1, max_size=3), min_size=1, max_size=4), st.floats(0, 1))
def test_enough_is_saved_and_nothing_could_be_given_back(points: list[list[tuple[float, float]]], share: float) -> None:
    options = {f"s{i}": site(*p) for i, p in enumerate(points)}
    most = sum(max(o.seconds for o in given) for given in options.values())
    chosen = choose(options, share * most)
    spare = saved(chosen.values()) - share * most
    assert spare >= -1e-9
    for name, option in chosen.items():
        better = [o for o in options[name] if o.loss < option.loss and option.seconds - o.seconds <= spare]
        assert not better
    combinations = itertools.product(*options.values())
    least = min(sum(o.loss for o in c) for c in combinations if saved(c) >= share * most - 1e-12)
    # The relaxation's gap is at most what one site loses more than it must (Shapley and Folkman).
    gap = max(max(o.loss for o in given) for given in options.values())
    assert sum(o.loss for o in chosen.values()) <= least + gap + 1e-9


def test_convex_options_are_chosen_as_by_trying_all() -> None:
    options = {f"s{i}": [Option(Action("thin", 5 - k), (i + 1) * k * k, k) for k in range(5)] for i in range(4)}
    for seconds in range(1, 16):
        least = min(sum(o.loss for o in c) for c in itertools.product(*options.values()) if saved(c) >= seconds)
        assert sum(o.loss for o in choose(options, seconds).values()) <= least * 1.26 + 1e-9


def test_runs_of_left_out_sites_are_cut() -> None:
    options = {f"s{i}": [_WHOLE, Option(Action("lowrank", 8), 1.0, 0.5), Option(SKIP, 1.1, 1.0)] for i in range(6)}
    assert all(o.action == SKIP for o in choose(options, 6.0).values())
    chosen = list(choose(options, 4.0, most_in_a_row=2).values())
    assert saved(chosen) >= 4
    assert not any(all(o.action == SKIP for o in chosen[i : i + 3]) for i in range(4))
    assert all(o.action != SKIP for o in choose(options, 2.0, most_in_a_row=0).values())
    with pytest.raises(skipc.PlanError, match=r"can save 3000\.00 ms of a call, not 3500\.00"):
        choose(options, 3.5, most_in_a_row=0)
