"""What a session did, call by call, so that it can be done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from skipc.ir.errors import PlanError

_FORMAT = 1


@dataclass(frozen=True)
class RouteStep:
    """One compiled call.

    Attributes:
        skipped: sites that no token went through.
        scale: factors other than 1, by which a skipped site multiplied the stream.
        tokens: for each site that only some tokens went through, a string for each row of the batch, with a 1 for a
            token that did and a 0 for one that did not.
        again: so many earlier tokens ran again before it, in full (``kv="backfill"``).
        adapted: True if a router added something to the stream of skipped tokens, which a route cannot do again.
    """

    skipped: frozenset[str]
    scale: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, Sequence[str]] = field(default_factory=dict)
    adapted: bool = False
    again: int = 0


@dataclass
class Route:
    """The calls of a session in order. Recorded by ``session(record=True)``, replayed by ``session(route=...)``."""

    steps: list[RouteStep] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def digest(self) -> str:
        """A digest of all actions, for regression tests: 16 hexadecimal digits."""
        return hashlib.sha256(self._text().encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write the route as JSON."""
        Path(path).write_text(self._text())

    @classmethod
    def load(cls, path: str | Path) -> Route:
        """Read a route.

        Raises:
            PlanError: if the file is no route of a known format.
        """
        try:
            read = json.loads(Path(path).read_text())
            if read["format"] != _FORMAT:
                raise ValueError(f"format {read['format']}")
            return cls(
                [
                    RouteStep(frozenset(s["skipped"]), s["scale"], s["tokens"], s["adapted"], s.get("again", 0))
                    for s in read["steps"]
                ]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise PlanError(f"{path} is no route of format {_FORMAT}: {error}") from None

    def _text(self) -> str:
        steps = [
            {"skipped": sorted(s.skipped), "scale": dict(s.scale), "tokens": dict(s.tokens), "adapted": s.adapted}
            | ({"again": s.again} if s.again else {})
            for s in self.steps
        ]
        return json.dumps({"format": _FORMAT, "steps": steps}, indent=1, sort_keys=True)
