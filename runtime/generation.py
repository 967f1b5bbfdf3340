"""``skipc.generate``: prefill and decode on a static cache, with guards checked when something changes."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from skipc.kernels.device import on_gpu
from skipc.runtime import sessions
from skipc.runtime.replay import Replay

from skipc.ir.errors import PlanError

log = logging.getLogger("skipc")

_SMALLEST = 256  # cache length
_CHUNK = 8  # tokens that run again together under kv="backfill"
_MAX_STATIC = 5  # kinds of decoders for which Dynamo compiles anew; it gives up on a model after 8 compilations

OnToken = Callable[[torch.Tensor], Any]


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
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.mask = torch.ones(batch, length, dtype=torch.long, device=device)
        self.fed = torch.zeros(batch, length, dtype=torch.long, device=device)  # tokens whose keys the cache has
        self.count = 0
        # One eager token lets the cache take the shapes of any architecture, before anything is compiled.
        model(input_ids=self.token, **self.cached)
        self.replay = Replay(self._step, lambda out: out.logits, model, [self.cache, *self.cache.layers])

    def fix_sizes(self) -> None:
        """Tell Dynamo to compile steps for just these sizes. Left alone it makes those variable that it saw change, and
        the kernels for few rows, and for keys and values of one length, need to know them."""
        caches = [t for layer in self.cache.layers for t in (layer.keys, layer.values)]
        for t in (self.token, self.position, self.mask, *caches):
            torch._dynamo.mark_static(t)

    def prefill(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Logits behind the prompt: float [batch, vocabulary]."""
        self.cache.reset()
        self.replay.forget()
        if (session := sessions.innermost(self.model)) is not None:
            session.new_request()
        extra: dict[str, Any] = {}
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            extra = {"attention_mask": mask.long(), "position_ids": positions}
            self.mask.fill_(1)
            self.mask[:, : ids.shape[1]] = mask
            self.position.copy_(positions[:, -1:])
        self.count = ids.shape[1]
        self.fed[:, : self.count] = ids
        out = self.call(input_ids=ids, **self.cached, **extra, **self._last_only())
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
            self.count += 1
        self.token.copy_(tokens[:, None])
        if self.padded:
            self.position += 1
        logits = self.replay.step(watched)[:, -1]
        return logits.clone() if on_gpu(logits) else logits  # a graph writes where it wrote before

    def _run_again(self, tokens: int, session: sessions.Session) -> None:
        """Compute the keys and values of the last ``tokens`` under ``session``, with every site running."""
        if any(type(layer).__name__ != "StaticLayer" for layer in self.cache.layers):
            raise PlanError("kv='backfill' needs a cache that holds all tokens; this model's slides")
        end = self.count
        if end != int(self.cache.layers[0].cumulative_length):
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
                self.call(input_ids=self.fed[:, some], **self.cached, **extra, **self._last_only())
                start = some.stop

    def _step(self) -> Any:
        extra = {"attention_mask": self.mask, "position_ids": self.position} if self.padded else {}
        return self.call(input_ids=self.token, **self.cached, **extra)

    def _last_only(self) -> dict[str, Any]:
        return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}


@torch.no_grad()
def generate(
    compiled: Any,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int = 128,
    attention_mask: torch.Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    logits_processor: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = (),
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = -1,
    pad_token_id: int | None = None,
    on_token: OnToken | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Continue prompts with a compiled Hugging Face decoder.

    Args:
        compiled: what :func:`skipc.compile` or ``torch.compile(model, backend="skipc")`` returned.
        input_ids: int64 ``[batch, prompt]``; shorter prompts are padded on the left.
        max_new_tokens: at most so many.
        attention_mask: ``[batch, prompt]``, 0 for padding. None: no padding.
        do_sample: draw from the distribution, instead of taking the likeliest token.
        temperature, top_k, top_p: shape the distribution, as in transformers.
        logits_processor: more processors in transformers' protocol, ``(ids, logits) -> logits``.
        generator: source of randomness.
        eos_token_id: tokens that end a row; None for none; by default those of the model's generation config.
        pad_token_id: what ended rows are filled with; by default the model's, else the first end token.
        on_token: called with each step's tokens, int64 ``[batch]``, as soon as they are known; a true result stops.
        progress: show a progress bar.

    Returns:
        int64 ``[batch, prompt + new]``, as transformers' ``generate``; ``new`` is the longest row's.

    Raises:
        TypeError: if the model takes no cache.
        ValueError: for a prompt of the wrong shape or padded on the right.
    """
    model, call = _target(compiled)
    _check_prompt(input_ids, attention_mask, max_new_tokens)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    ends, pad = _ends(model, eos_token_id, pad_token_id)
    process = _processors(do_sample, temperature, top_k, top_p, logits_processor)
    batch, prompt = input_ids.shape
    if max_new_tokens == 0:
        return input_ids
    decoder = _decoder(compiled, model, call, batch, prompt + max_new_tokens, attention_mask is not None)
    tokens = input_ids.new_full((batch, prompt + max_new_tokens), pad)
    tokens[:, :prompt] = input_ids
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    logits = decoder.prefill(input_ids, attention_mask)
    foreign = on_token is not None or bool(logits_processor)  # code that may edit the model between tokens
    count = 0
    with _bar(progress, max_new_tokens) as advance:
        while True:
            logits = process(tokens[:, : prompt + count], logits.float()) if process else logits
            new = draw(logits, generator) if do_sample else logits.argmax(-1)
            new = torch.where(running, new, pad)
            tokens[:, prompt + count] = new
            count += 1
            advance()
            if ends is not None:
                running &= ~torch.isin(new, ends)
            stop = on_token(new) if on_token is not None else False
            if stop or count == max_new_tokens or (ends is not None and not running.any()):
                break
            logits = decoder.decode(new, watched=foreign)
    if decoder.replay.refused:
        log.info("generate: guards are checked at each token: %s", decoder.replay.refused)
    return tokens[:, : prompt + count]


def _target(compiled: Any) -> tuple[torch.nn.Module, Callable[..., Any]]:
    model = getattr(compiled, "model", None)
    if not hasattr(compiled, "session") or not isinstance(model, torch.nn.Module):
        model = getattr(compiled, "_orig_mod", compiled)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"skipc.generate takes a compiled model, not {type(compiled).__name__}")
    if cache_argument(model) is None or not hasattr(model, "config"):
        raise TypeError(f"skipc.generate needs a Hugging Face decoder; {type(model).__name__}.forward takes no cache")
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(f"skipc.generate runs decoders alone; use compiled.generate(...) for {type(model).__name__}")
    return model, compiled


def _check_prompt(ids: torch.Tensor, mask: torch.Tensor | None, new: int) -> None:
    if ids.dim() != 2 or ids.dtype != torch.long or ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be int64 [batch, prompt] with a token or more, not {ids.dtype} {list(ids.shape)}"
        )
    if new < 0:
        raise ValueError(f"max_new_tokens must not be negative, got {new}")
    if mask is None:
        return
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask {list(mask.shape)} does not fit input_ids {list(ids.shape)}")
    if not bool(mask[:, -1].all()) or bool((mask.long().diff(dim=1) < 0).any()):
        raise ValueError("prompts must be padded on the left")


def _ends(model: Any, eos: int | Sequence[int] | None, pad: int | None) -> tuple[torch.Tensor | None, int]:
    config = getattr(model, "generation_config", None)
    if eos == -1:
        eos = getattr(config, "eos_token_id", None)
    ids = [eos] if isinstance(eos, int) else list(eos or [])
    if pad is None:
        pad = getattr(config, "pad_token_id", None)
    if pad is None:
        pad = ids[0] if ids else 0
    return (torch.tensor(ids, device=next(model.parameters()).device) if ids else None), pad


def _processors(
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    more: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    from transformers.generation import logits_process as hf

    chain: list[Any] = list(more)
    if do_sample:
        if temperature != 1.0:
            chain.append(hf.TemperatureLogitsWarper(temperature))
        if top_k:
            chain.append(hf.TopKLogitsWarper(top_k))
        if top_p is not None and top_p < 1.0:
            chain.append(hf.TopPLogitsWarper(top_p))
    made: Any = hf.LogitsProcessorList(chain) if chain else None
    return made


def draw(logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """A token for each row, int64 ``[rows]``, with the probabilities that ``logits``, ``[rows, vocabulary]``, make:
    where a random number falls among their sums. (``torch.multinomial`` draws a number for each token of the
    vocabulary, 1.2 ms a row of 49,152 on CPU, a fourteenth of SmolLM2's step.)

    Raises:
        ValueError: for logits that are not numbers, or that leave no token.
    """
    sums = logits.float().softmax(-1).cumsum(-1)
    total = sums[:, -1:]
    if not bool(total.isfinite().all()):
        raise ValueError("there is no token to draw: the logits are not numbers, or all of them are -inf")
    point = torch.rand(total.shape, generator=generator, device=total.device) * total
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))  # never behind the last likely one
    return torch.searchsorted(sums, point, right=True)[:, 0]


def _decoder(
    compiled: Any, model: torch.nn.Module, call: Callable[..., Any], batch: int, tokens: int, padded: bool
) -> Decoder:
    """The decoder that the last request left behind, if it is for as many rows and has room for ``tokens`` (a step
    reads only what is in use, so a longer cache costs no time); its cache is the largest thing here, so only one is
    kept."""
    state = vars(compiled)
    last: Decoder | None = state.get("_decoder")
    inference = torch.is_inference_mode_enabled()  # what was made in it nobody outside may write
    same = last is not None and (last.batch, last.padded, last.token.is_inference()) == (batch, padded, inference)
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


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("generating", total=total)
        yield lambda: bar.advance(task)
