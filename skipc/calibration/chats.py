"""Conversations that a chat model writes itself, to calibrate on where the user brings none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from skipc.ir.errors import SkipcError
from skipc.model import CompiledModel
from skipc.model import compile as compile_model
from skipc.runtime.generation import generate

_MARKERS = ("zqaskzq", "zqtellzq", "zqmorezq")  # messages that no template has words of
_LONGEST = 96  # tokens of a user's message: where the model loses itself in one, it would never come to answer


class NoChatsError(SkipcError, ValueError):
    """A model cannot write conversations; the message says why."""


@dataclass(frozen=True)
class Turns:
    """Token ids around the messages of a conversation.

    Attributes:
        opening: before the first message of the user, a system text included.
        between: what follows the user's messages, and what follows the assistant's.
    """

    opening: tuple[int, ...]
    between: tuple[tuple[int, ...], tuple[int, ...]]


def turns_of(tokenizer: Any) -> Turns:
    """What the tokenizer's chat template puts around messages: it renders a conversation of known ones.

    Raises:
        NoChatsError: if there is no template, or none that can be told apart like that.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise NoChatsError("the tokenizer has no chat template")
    said = [{"role": r, "content": c} for r, c in zip(("user", "assistant", "user"), _MARKERS, strict=True)]
    try:
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are programs, which refuse what they like in words of their own
        raise NoChatsError(f"the chat template does not render a conversation: {error}") from error
    places = [text.find(marker) for marker in _MARKERS]
    if -1 in places or places != sorted(places) or any(text.count(marker) != 1 for marker in _MARKERS):
        raise NoChatsError("the chat template does not have each message once, in order")
    ends = [p + len(m) for p, m in zip(places, _MARKERS, strict=True)]

    def ids(start: int, end: int) -> tuple[int, ...]:
        """Of a part, as it is tokenized behind what is before it. A blank at its end stays for the message, whose first
        word most vocabularies join it to."""
        known, whole = (
            tokenizer(t, add_special_tokens=False, verbose=False).input_ids if t else []
            for t in (text[:start], text[:end].rstrip(" "))
        )
        if whole[: len(known)] != known or len(whole) == len(known):
            raise NoChatsError("the chat template has no tokens of its own between messages")
        return tuple(whole[len(known) :])

    return Turns(ids(0, places[0]), (ids(ends[2], len(text)), ids(ends[1], places[2])))


def chats(
    model: Any,
    tokenizer: Any,
    tokens: int,
    count: int,
    seed: int,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """``count`` conversations that the model writes, the user's messages too, drawn from its own distribution in its
    own template (Magpie, arXiv 2406.08464): int64 ``[1, tokens]`` each, the last turn cut. They are the same for the
    same seed, machine and number of threads.

    Args:
        model: a Hugging Face decoder in evaluation mode, or what :func:`skipc.compile` made of it.
        progress: wraps an iterable, as ``tqdm`` or ``rich`` do.
        temperature: of the assistant's turns; the user's have 1.

    Raises:
        NoChatsError: if :func:`skipc.generate` cannot run the model, or the tokenizer's template cannot be used.
    """
    turns = turns_of(tokenizer)
    compiled = model if isinstance(model, CompiledModel) else compile_model(model, on_error="raise")
    weight = next(compiled.parameters())
    rows = min(count, 16 if weight.dtype == torch.float32 else 8)  # as many as the kernels for few rows take
    start = torch.tensor([turns.opening], device=weight.device).expand(rows, -1)
    if start.shape[1] >= tokens:
        raise NoChatsError(f"the chat template opens with {start.shape[1]} tokens, which leaves nothing of {tokens}")
    try:
        generate(compiled, start, max_new_tokens=0)  # refuses what it cannot run
    except TypeError as error:
        raise NoChatsError(str(error)) from error
    generator = torch.Generator(weight.device).manual_seed(seed)
    made: list[torch.Tensor] = []
    batches = range(0, count, rows)
    for _ in progress(batches) if progress else batches:
        written = generate(
            compiled, start, max_new_tokens=tokens - start.shape[1], do_sample=True, generator=generator,
            eos_token_id=None, logits_processor=[_Talk(turns, tokenizer, rows, temperature)],
        )  # fmt: skip
        made += written.cpu().split(1)
    return made[:count]


@dataclass
class _Row:
    """A conversation under way.

    Attributes:
        side: whose turn it is, 0 the user's, 1 the assistant's.
        said: ids of this turn so far.
        due: ids that come next whatever the model would say, the last first.
        forced: whether the id before this one was such a one.
    """

    side: int = 0
    said: list[int] = field(default_factory=list)
    due: list[int] = field(default_factory=list)
    forced: bool = True


class _Talk:
    """A logits processor that lets rows, which begin with a template's opening, become conversations: where the model
    ends a turn, what the template has between turns is all that is left to choose."""

    def __init__(self, turns: Turns, tokenizer: Any, rows: int, temperature: float):
        self.turns, self.temperature, self.rows = turns, temperature, [_Row() for _ in range(rows)]
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {i for i, token in added.items() if token.special} | {*tokenizer.all_special_ids}
        # Where turns end with ordinary words, the first of them may as well be part of a message.
        self.ends = [{tokenizer.eos_token_id, ids[0]} & self.special for ids in turns.between]
        self.never: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``ids`` int64 ``[rows, tokens]``, ``logits`` float ``[rows, vocabulary]``."""
        if self.never is None:
            self.never = self._never(logits.shape[1]).to(logits.device)
        for row, last in zip(self.rows, ids[:, -1].tolist(), strict=True):
            if not row.forced:
                self._hear(row, last)
            row.forced = bool(row.due)
        states = [2 * row.side + (not row.said) for row in self.rows]
        logits = logits.masked_fill(self.never[states], float("-inf"))
        for i, row in enumerate(self.rows):
            if row.due:
                logits[i] = float("-inf")
                logits[i, row.due.pop()] = 0.0
            elif row.side == 1:
                logits[i] /= self.temperature
        return logits

    def _hear(self, row: _Row, last: int) -> None:
        """Take in what the model said, and whether that ends its turn."""
        row.said.append(last)
        between = self.turns.between[row.side]
        if last in self.ends[row.side]:
            due = between[1:] if last == between[0] else between
        elif tuple(row.said[-len(between) :]) == between:
            due = ()
        elif row.side == 0 and len(row.said) >= _LONGEST:
            due = between
        else:
            return
        row.side, row.said, row.due = 1 - row.side, [], [*reversed(due)]

    def _never(self, vocabulary: int) -> torch.Tensor:
        """bool ``[side and whether nothing was said yet, vocabulary]``: special tokens have no place in a message, and
        a turn does not end before it began."""
        made = torch.zeros(4, vocabulary, dtype=torch.bool)
        for state in range(4):
            ends = self.ends[state // 2]
            some = self.special if state % 2 else self.special - ends
            made[state, [i for i in some if i < vocabulary]] = True
        return made
