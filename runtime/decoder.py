"""A model on a static cache: what generation steps, with guards checked when something changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from skipc.kernels.device import on_gpu
from skipc.runtime import sessions
from skipc.runtime.replay import Replay
from skipc.runtime.speculation.pace import Pace

from skipc.ir.errors import PlanError

_SMALLEST = 256  # cache length
_CHUNK = 8  # tokens that run again together under kv="backfill"
_MAX_STATIC = 5  # kinds of decoders for which Dynamo compiles anew
_MOST_COMPILED = 64  # programs of a model: for each kind of decoder prompts, steps, and calls that judge drafts


def cache_argument(model: torch.nn.Module) -> str | None:
    """What ``model.forward`` calls its cache: ``cache`` from transformers 5.24 on, ``past_key_values`` before; None if
    it takes none."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


class Decoder:
    """A model, a static cache for ``batch`` rows of up to ``length`` tokens, and the buffers that a step reads."""

    def __init__(self, model: Any, call: Callable[..., Any], batch: int, length: int, padded: bool):
        from transformers import StaticCache

        device = next(model.parameters()).device
        self.model, self.call, self.batch, self.length, self.padded = model, call, batch, length, padded
        self.cache: Any = StaticCache(config=model.config, max_cache_len=length)
        self.cached = {cache_argument(model) or "past_key_values": self.cache}
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)  # of each row's last token
        self.mask = torch.ones(batch, length, dtype=torch.long, device=device)
        self.fed = torch.zeros(batch, length, dtype=torch.long, device=device)  # tokens whose keys the cache has
        self.count = 0  # tokens of each row in the cache, holes included
        self._fed = 0  # how many of them `fed` has
        self._fixed = False  # sizes
        self._steps: dict[int, _Step] = {1: _Step(self, 1)}  # by new tokens of each row
        self.paces: dict[Hashable, Pace] = {}  # of speculation, by what drafts
        # One eager token lets the cache take the shapes of any architecture, before anything is compiled.
        model(input_ids=self._steps[1].token, **self.cached)

    @property
    def replay(self) -> Replay:
        """Of steps of one new token."""
        return self._steps[1].replay

    def fix_sizes(self) -> None:
        """Tell Dynamo to compile steps for just these sizes. Left alone it makes those variable that it saw change, and
        the kernels for few rows, and for keys and values of one length, need to know them."""
        caches = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        for t in (self.mask, *caches):
            torch._dynamo.mark_static(t)
        self._fixed = True
        for step in self._steps.values():
            step.fix_sizes()

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits behind the prompt: float [batch, vocabulary]."""
        self.cache.reset()
        for step in self._steps.values():
            step.replay.forget()
        if (session := sessions.innermost(self.model)) is not None:
            session.new_request()
        extra: dict[str, Any] = {}
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            extra = {"attention_mask": mask.long(), "position_ids": positions}
            self.mask.fill_(1)
            self.mask[:, : ids.shape[1]] = mask
            self.position.copy_(positions[:, -1:])
        elif self.padded:
            self.mask.fill_(1)
            self.position.fill_(ids.shape[1] - 1)
        self.count = self._fed = ids.shape[1]
        self.fed[:, : self.count] = ids
        out = self._called(input_ids=ids, **self.cached, **extra, **self._last_only())
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def decode(self, tokens: torch.Tensor, watched: bool = True) -> torch.Tensor:
        """Logits behind ``tokens``, int64 [batch]: float [batch, vocabulary]. The model need not be ``watched`` for
        edits where no code but this has run since the last token."""
        session = sessions.innermost(self.model)
        if session is not None and session.fills:
            if missing := session.missing:
                self._run_again(missing, session.again())
                session.filled(missing)
            self.fed[:, self.count] = tokens
            self._fed += 1
        logits = self.judge(tokens[:, None], watched)[:, -1]
        if self.padded:
            self.position += 1
        return logits

    def judge(self, tokens: torch.Tensor, watched: bool = True) -> torch.Tensor:
        """Logits behind each of ``tokens``, int64 [batch, new], all given at once: float [batch, new, vocabulary]. They
        are in the cache then; :meth:`keep` takes back those that shall not be."""
        new = tokens.shape[1]
        step = self._steps.get(new)
        if step is None:
            step = self._steps[new] = _Step(self, new)
        step.token.copy_(tokens)
        if self.padded:
            torch.add(self.position, step.offsets, out=step.position)
        self.count += new
        logits = step.replay.step(watched)
        return logits.clone() if on_gpu(logits) else logits  # a graph writes where it wrote before

    def ready(self, new: int) -> bool:
        """Whether calls of so many new tokens run without being looked at first."""
        step = self._steps.get(new)
        return step is not None and (step.replay.repeats or step.replay.refused is not None)

    def keep(self, new: int, kept: Sequence[int]) -> None:
        """Of the ``new`` tokens that were judged last, keep the first ``kept`` of each row, and forget the others. Rows
        stay side by side: where one keeps fewer than another, its cache has holes, which its mask hides."""
        first, most = self.count - new, max(kept)
        if self.padded:
            for row, here in enumerate(kept):
                if here < most:
                    self.mask[row, first + here : first + most] = 0
            self.position += torch.tensor(kept, device=self.position.device)[:, None]
        elif min(kept) < most:
            raise ValueError("rows that keep different numbers of tokens need a decoder with a mask")
        self.rewind(first + most)

    def rewind(self, count: int) -> None:
        """Forget all but the first ``count`` tokens."""
        if count != self.count:
            torch._foreach_copy_(
                self._counters, [torch.tensor(count, device=self.position.device)] * len(self._counters)
            )
            self.count = count

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Steps inside it are forgotten at its end."""
        count, position = self.count, self.position.clone()
        try:
            yield
        finally:
            self.rewind(count)
            self.position.copy_(position)

    @property
    def rewinds(self) -> bool:
        """Whether the cache can forget its last tokens: not where it has written over older ones for them."""
        return all(type(layer).__name__ == "StaticLayer" for layer in self.cache.layers)

    @property
    def _counters(self) -> list[torch.Tensor]:
        return [layer.cumulative_length for layer in self.cache.layers]

    def close_holes(self) -> None:
        """Move the tokens of each row together, so that the longest has no holes: for when the cache is full."""
        seen = self.mask[:, : self.count].bool()
        most = int(seen.sum(1).max())
        hidden_first = seen.to(torch.int8).argsort(dim=1, stable=True)
        order = hidden_first[:, self.count - most :]
        for layer in self.cache.layers:
            for t in (layer.keys, layer.values):
                at = order[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])
                t[:, :, :most] = t.gather(2, at)
        hidden = seen.gather(1, order)
        self.mask.fill_(1)
        self.mask[:, :most] = hidden
        self.rewind(most)

    def _run_again(self, tokens: int, session: sessions.Session) -> None:
        """Compute the keys and values of the last ``tokens`` under ``session``, with every site running."""
        if not self.rewinds:
            raise PlanError("kv='backfill' needs a cache that holds all tokens; this model's slides")
        end = self.count
        if end != self._fed:
            raise PlanError("kv='backfill' needs a session that is open from the prompt on")
        start = max(0, end - tokens)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(start)
        with session:
            while start < end:
                some = slice(start, min(start + _CHUNK, end))
                extra: dict[str, Any] = {}
                if self.padded:
                    positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
                    extra = {"attention_mask": self.mask, "position_ids": positions[:, some]}
                self._called(input_ids=self.fed[:, some], **self.cached, **extra, **self._last_only())
                start = some.stop

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> Any:
        """What the model makes of new tokens of each row, int64 [batch, new], at these positions."""
        extra = {"attention_mask": self.mask, "position_ids": position} if self.padded else {}
        return self._called(input_ids=token, **self.cached, **extra)

    def _called(self, **given: Any) -> Any:
        """The compiled call. On what `torch.compile` made Dynamo gives up after 8 compilations, for fear of sizes that
        vary without end; here all kinds of calls are known. (`skipc.compile` has a limit of its own.)"""
        limit = max(_MOST_COMPILED, torch._dynamo.config.recompile_limit)
        with torch._dynamo.config.patch(recompile_limit=limit):
            return self.call(**given)

    def _last_only(self) -> dict[str, Any]:
        return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}


class _Step:
    """Calls of some new tokens of each row, and the buffers that they read."""

    def __init__(self, decoder: Decoder, new: int):
        device = decoder.position.device
        self.token = torch.zeros(decoder.batch, new, dtype=torch.long, device=device)
        self.position = torch.zeros_like(self.token)
        self.offsets = torch.arange(1, new + 1, device=device)[None]
        self.replay = Replay(
            lambda: decoder.forward(self.token, self.position),
            lambda out: out.logits,
            decoder.model,
            [decoder.cache, *decoder.cache.layers],
        )
        if decoder._fixed:
            self.fix_sizes()

    def fix_sizes(self) -> None:
        """See :meth:`Decoder.fix_sizes`."""
        torch._dynamo.mark_static(self.token)
        torch._dynamo.mark_static(self.position)


def decoder_for(
    compiled: Any, model: torch.nn.Module, call: Callable[..., Any], batch: int, tokens: int, padded: bool
) -> Decoder:
    """The decoder that the last request left behind, if it is for as many rows and has room for ``tokens`` (a step
    reads only what is in use, so a longer cache costs no time); its cache is the largest thing here, so only one is
    kept."""
    state = vars(compiled)
    last: Decoder | None = state.get("_decoder")
    inference = torch.is_inference_mode_enabled()  # what was made in it nobody outside may write
    same = last is not None and (last.batch, last.padded, last.position.is_inference()) == (batch, padded, inference)
    if last is not None and same and last.model is model and last.length >= tokens:
        return last
    object.__setattr__(compiled, "_decoder", None)
    made = Decoder(model, call, batch, cache_length(tokens), padded)
    kinds: set[tuple[int, int, bool]] = state.get("_decoder_kinds") or set()
    kinds.add((batch, made.length, padded))
    if len(kinds) <= _MAX_STATIC:
        made.fix_sizes()
    object.__setattr__(compiled, "_decoder", made)
    object.__setattr__(compiled, "_decoder_kinds", kinds)
    return made


def cache_length(tokens: int) -> int:
    """Room for ``tokens``, in steps of a half or a third of itself, so that requests share few compilations."""
    length = _SMALLEST
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return length
