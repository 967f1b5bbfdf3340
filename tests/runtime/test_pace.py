"""When drafts are judged, and how many at a time."""

from __future__ import annotations

from skipc.runtime.speculation.pace import _AGAIN, Pace

from skipc import Proposal

SOME = Proposal([1] * 7, ["kind"] * 7)


def pace(cost: float = 1.3) -> Pace:
    made = Pace((1, 4, 8))
    for _ in range(4):
        made.took(1, 1.0)
        made.took(4, cost)
        made.took(8, 1.5 * cost)
    made.took(1, 1.0)
    return made


def test_nothing_is_judged_before_plain_steps_are_known() -> None:
    fresh = Pace((1, 4))
    assert fresh.choose([SOME], 9)[0] == 1
    for _ in range(3):
        fresh.took(1, 1.0)
    assert fresh.choose([SOME], 9)[0] == 4


def test_drafts_that_are_right_are_judged_many_at_a_time() -> None:
    made = pace()
    for _ in range(100):
        made.came(["kind"] * 7, 7)
    assert made.choose([SOME], 9)[0] == 8
    assert made.choose([SOME], 7)[0] == 4
    assert made.choose([Proposal([1, 1], ["kind"] * 2)], 9)[0] == 4
    assert made.choose([Proposal()], 9)[0] == 1


def test_drafts_that_are_wrong_are_not_judged_until_they_would_have_been_right() -> None:
    made = pace()
    for _ in range(100):
        made.came(["kind"], 0)
    assert made.choose([SOME], 9)[0] == 1
    assert made.choose([Proposal([1] * 7, ["other"] * 7)], 9)[0] > 1
    for _ in range(100):
        made.came(["kind"], 1)  # as plain steps tell
    assert made.choose([SOME], 9)[0] == 8


def test_calls_that_take_too_long_are_not_made() -> None:
    made = pace(cost=5.0)
    for _ in range(100):
        made.came(["kind"] * 7, 7)
    assert made.choose([SOME], 9)[0] == 1 or made.cost(8) < 8
    assert pace(cost=9.0).choose([SOME], 9)[0] == 1


def test_plain_steps_are_timed_again() -> None:
    made = pace()
    for _ in range(100):
        made.came(["kind"] * 7, 7)
    chosen = []
    for _ in range(2 * _AGAIN + 6):
        chosen.append(made.choose([SOME], 9)[0])
        made.took(chosen[-1], 1.0)
    assert chosen.count(1) == 2


def test_rows_share_a_call() -> None:
    made = pace(cost=1.5)
    for _ in range(100):
        made.came(["kind"] * 7, 7)
    assert made.choose([SOME] + [Proposal()] * 7, 9)[0] == 1
    assert made.choose([SOME] * 7 + [Proposal()], 9)[0] == 8
