"""Drafts that look up, and what is said about speculation."""

from __future__ import annotations

from typing import Any

import pytest

import skipc


class TestPromptLookup:
    def propose(self, text: str, most: int = 4, **how: int) -> tuple[str, Any]:
        draft = skipc.PromptLookup(**how)
        draft.start([[ord(c) for c in text]])
        (found,) = draft.propose([most])
        assert len(set(found.kinds)) <= 1
        return "".join(map(chr, found.tokens)), next(iter(found.kinds), None)

    def test_what_followed_the_last_time(self) -> None:
        assert self.propose("abcX..abcY..abc") == ("Y..a", 5)
        assert self.propose("..abcdef abc") == ("def ", 3)

    def test_fewer_tokens_where_more_are_new(self) -> None:
        assert self.propose("12 Xb")[0] == ""
        assert self.propose("ab..Xb") == ("..Xb", 1)
        assert self.propose("ab..Xb", shortest=2) == ("", None)

    def test_repetition_goes_on(self) -> None:
        assert self.propose("xyxy", 5) == ("xyxyx", 2)

    def test_rows_are_apart_and_grow(self) -> None:
        draft = skipc.PromptLookup()
        draft.start([[1, 2, 3], [5, 6, 5]])
        assert [list(p.tokens) for p in draft.propose([3, 2])] == [[], [6, 5]]
        draft.extend(0, [1, 2])
        assert [list(p.tokens) for p in draft.propose([3, 0])] == [[3, 1, 2], []]

    def test_settings_are_checked(self) -> None:
        with pytest.raises(ValueError, match="shortest"):
            skipc.PromptLookup(2, 3)
        with pytest.raises(skipc.ConfigError, match="2 or more"):
            skipc.Speculation(widths=[1])


class TestNGramCache:
    def propose(self, cache: skipc.NGramCache, prompt: list[int], most: int = 4) -> skipc.Proposal:
        cache.start([prompt])
        return cache.propose([most])[0]

    def said(self, cache: skipc.NGramCache, prompt: list[int], tokens: list[int]) -> None:
        cache.start([prompt])
        for token in tokens:
            cache.extend(0, [token])

    def test_what_came_in_an_earlier_request(self) -> None:
        cache = skipc.NGramCache()
        assert self.propose(cache, [1, 2]) == ([], [])
        self.said(cache, [1, 2], [3, 4, 5])
        assert self.propose(cache, [9, 1, 2]) == ([3, 4, 5], [(2, 1), (3, 1), (4, 1)])
        assert self.propose(cache, [9, 1, 2], 1) == ([3], [(2, 1)])
        assert self.propose(cache, [9, 1, 2], 0) == ([], [])
        assert self.propose(cache, [1]) == ([], [])  # the prompt was not learned

    def test_the_longest_context_decides_and_the_last_time(self) -> None:
        cache = skipc.NGramCache(order=2)
        self.said(cache, [1, 2], [3])
        self.said(cache, [7, 2], [4])
        assert self.propose(cache, [1, 2], 1) == ([3], [(2, 1)])
        assert self.propose(cache, [8, 2], 1) == ([4], [(1, 1)])
        self.said(cache, [1, 2], [5])
        assert self.propose(cache, [1, 2], 1).tokens == [5]

    def test_times_in_a_row_are_counted(self) -> None:
        cache = skipc.NGramCache(order=1)
        for times in range(1, 12):
            self.said(cache, [1], [0])
            assert self.propose(cache, [1], 1) == ([0], [(1, min(times, 7))])
        self.said(cache, [1], [1 << 40])
        assert self.propose(cache, [1], 1) == ([1 << 40], [(1, 1)])

    def test_rows_are_apart(self) -> None:
        cache = skipc.NGramCache(order=1)
        cache.start([[1], [2]])
        cache.extend(0, [5, 6])
        cache.extend(1, [7])
        cache.start([[1], [2], []])
        assert [list(p.tokens) for p in cache.propose([1, 3, 3])] == [[5], [7], []]

    def test_the_oldest_goes(self) -> None:
        cache = skipc.NGramCache(order=1, capacity=16)
        for token in range(40):
            self.said(cache, [token], [token + 1])
            self.said(cache, [0], [99])  # comes again and again
        assert len(cache) <= 16
        assert self.propose(cache, [39], 1).tokens == [40]
        assert self.propose(cache, [0], 1).tokens == [99]
        assert self.propose(cache, [3], 1).tokens == []

    def test_settings_are_checked(self) -> None:
        with pytest.raises(ValueError, match="capacity"):
            skipc.NGramCache(capacity=0)
