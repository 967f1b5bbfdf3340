"""When drafts are judged, and how many at a time."""

from __future__ import annotations

from itertools import pairwise

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
    for seconds in (9.0, 1.0, 1.0, 1.0):  # the first is not counted
        assert fresh.plain_is_due
        fresh.took(1, seconds)
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


def test_the_slowest_row_counts() -> None:
    made = pace(cost=1.5)
    for _ in range(100):
        made.came(["kind"] * 7, 7)
    assert made.choose([SOME] * 7 + [Proposal()], 9)[0] == 1
    assert made.choose([SOME] * 8, 9)[0] == 8


class TestModels:
    """Models that draft cost time."""

    def known(self, cost: float, rate: float, made: Pace | None = None, name: str = "model") -> Pace:
        made = made or pace(cost=1.2)
        for _ in range(10):
            made.drafted(name, 3, 3 * cost)
            for hit in [1] * round(10 * rate) + [0] * round(10 - 10 * rate):
                made.came([(name, 9)], hit, name)
        return made

    def test_what_pays_drafts(self) -> None:
        assert self.known(0.2, 0.8).choose_model(["model"], 8, 1.0) == "model"
        assert self.known(0.2, 0.8).choose_model(["model"], 8, 3.0) is None  # look-ups promise more
        assert self.known(0.2, 0.8).choose_model(["model"], 3, 1.0) is None  # no room for a call
        two = self.known(0.1, 0.8, self.known(0.5, 0.9), "other")
        assert two.choose_model(["model", "other"], 8, 1.0) == "other"

    def test_what_is_not_known_is_tried(self) -> None:
        assert pace().choose_model(["model"], 8, 1.0) == "model"
        assert Pace((1, 4)).choose_model(["model"], 8, 1.0) is None  # plain steps come first

    def test_what_does_not_pay_is_tried_ever_more_seldom(self) -> None:
        made = self.known(0.9, 0.2)
        tried = []
        for call in range(4000):
            if made.choose_model(["model"], 8, 1.0) is not None:
                tried.append(call)
                made.drafted("model", 3, 2.7)
            made.took(1, 1.0)
        waits = [b - a for a, b in pairwise(tried)]
        assert len(tried) < 8
        assert waits == sorted(waits)

    def test_drafts_end_where_more_tokens_are_not_worth_their_time(self) -> None:
        sure = self.known(0.1, 1.0)
        assert all(sure.goes_on("model", [[("model", 9)] * n], 8) for n in range(1, 7))
        assert not sure.goes_on("model", [[("model", 9)] * 7], 8)
        unsure = self.known(0.1, 0.9)
        for _ in range(100):
            unsure.came([("model", 1)], 0)
        assert unsure.goes_on("model", [[("model", 9)] * 2], 8)
        assert not unsure.goes_on("model", [[("model", 9), ("model", 1)]], 8)
        assert not self.known(0.9, 0.5).goes_on("model", [[("model", 9)] * 3], 8)

    def test_rows_are_weighed_together(self) -> None:
        made = self.known(0.1, 0.9)
        for _ in range(100):
            made.came([("model", 1)], 0)
        good, bad = [("model", 9)] * 2, [("model", 1)] * 2
        assert made.goes_on("model", [good, good, bad], 8)
        assert not made.goes_on("model", [bad, bad, bad], 8)


def test_calls_that_took_very_long_are_not_repeated() -> None:
    made = Pace((1, 4), rows=4)
    for _ in range(4):
        made.took(1, 1.0)
    for _ in range(20):
        made.came(["kind"] * 7, 7)
    assert made.choose([SOME], 9)[0] == 4
    made.took(4, 60.0)
    assert made.choose([SOME], 9)[0] == 4  # that was the first
    made.took(4, 6.0)
    assert made.choose([SOME], 9)[0] == 1
    made.took(4, 2.0)  # had another request not thought so
    assert made.choose([SOME], 9)[0] == 4
