"""What a session tells of its calls."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class SessionStats:
    """What ran under a session."""

    calls: int = 0
    ran: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    recompiles: int = 0
    adapters: str = ""  # how they ran, and why
    backfilled: int = 0  # tokens that were run again because an attention lacked their keys
    seconds: dict[str, float] = field(default_factory=dict)
    similarity: dict[str, float] = field(default_factory=dict)
    histogram: dict[str, list[int]] = field(default_factory=dict)  # tokens by similarity: see similarity_stats.EDGES
    agreement: dict[str, float] = field(
        default_factory=dict
    )  # share of a call's tokens on the same side of a threshold

    def __str__(self) -> str:
        lines = [f"{self.calls} calls, {self.recompiles} recompilations"]
        lines += [f"  adapters: {self.adapters}"] if self.adapters else []
        for name in sorted({*self.ran, *self.skipped}):
            similar = f", similarity {self.similarity[name]:.4f}" if name in self.similarity else ""
            lines.append(f"  {name}: ran {self.ran[name]}, skipped {self.skipped[name]}{similar}")
        return "\n".join(lines)
