"""``skipc.generate``: prefill and decode on a static cache."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from skipc.runtime import sessions
from skipc.runtime.decoder import Decoder, cache_argument, decoder_for
from skipc.runtime.drawing import draw
from skipc.runtime.rules import OnToken, Rules
from skipc.runtime.speculation.loop import Request
from skipc.runtime.speculation.pace import Pace
from skipc.runtime.speculation.settings import Speculation, SpeculationStats

log = logging.getLogger("skipc")


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
    speculative: bool | Speculation = False,
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
        speculative: draft tokens, and have the model judge several in a call: the same greedy tokens, and the same
            distribution where tokens are drawn, in less time where drafts are right. What drafts, and how it went:
            :class:`skipc.Speculation`.

    Returns:
        int64 ``[batch, prompt + new]``, as transformers' ``generate``; ``new`` is the longest row's.

    Raises:
        TypeError: if the model takes no cache, or ``speculative`` is something else.
        ValueError: for a prompt of the wrong shape or padded on the right.
    """
    model, call = target(compiled)
    _check_prompt(input_ids, attention_mask, max_new_tokens)
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    ends, pad = _ends(model, eos_token_id, pad_token_id)
    process = _processors(do_sample, temperature, top_k, top_p, logits_processor)
    batch, prompt = input_ids.shape
    if max_new_tokens == 0:
        return input_ids
    speculation = _speculation(speculative, model, batch, bool(logits_processor))
    more = max(speculation.widths_for(batch, model)) if speculation is not None else 0
    padded = attention_mask is not None or (speculation is not None and batch > 1)
    decoder = decoder_for(compiled, model, call, batch, prompt + max_new_tokens + more, padded)
    if speculation is not None and not decoder.rewinds:
        _plainly(speculation, "the model's cache slides, so that tokens cannot be taken back")
        speculation = None
    logits = decoder.prefill(input_ids, attention_mask)
    foreign = on_token is not None or bool(logits_processor)  # code that may edit the model between tokens
    ids = frozenset(ends.tolist()) if ends is not None else frozenset()
    with _bar(progress, max_new_tokens) as advance:
        rules = Rules(max_new_tokens, ids, pad, process, do_sample, generator, on_token, foreign, advance)
        if speculation is not None:
            new = _speculated(speculation, decoder, input_ids, attention_mask, logits, rules)
        else:
            new = _plain(decoder, input_ids, logits, rules, ends)
    if decoder.replay.refused:
        log.info("generate: guards are checked at each token: %s", decoder.replay.refused)
    return torch.cat([input_ids, new], 1)


def _plain(
    decoder: Decoder,
    input_ids: torch.Tensor,
    logits: torch.Tensor,
    rules: Rules,
    ends: torch.Tensor | None,
) -> torch.Tensor:
    """New tokens, int64 ``[batch, new]``, one at a time."""
    batch, prompt = input_ids.shape
    tokens = input_ids.new_full((batch, prompt + rules.most), rules.pad)
    tokens[:, :prompt] = input_ids
    running = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    count = 0
    while True:
        logits = rules.process(tokens[:, : prompt + count], logits.float()) if rules.process else logits
        new = draw(logits, rules.generator) if rules.sample else logits.argmax(-1)
        new = torch.where(running, new, rules.pad)
        tokens[:, prompt + count] = new
        count += 1
        rules.advance()
        if ends is not None:
            running &= ~torch.isin(new, ends)
        stop = rules.on_token(new) if rules.on_token is not None else False
        if stop or count == rules.most or (ends is not None and not running.any()):
            return tokens[:, prompt : prompt + count]
        logits = decoder.decode(new, watched=rules.watched)


def _speculated(
    speculation: Speculation,
    decoder: Decoder,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    logits: torch.Tensor,
    rules: Rules,
) -> torch.Tensor:
    """New tokens, int64 ``[batch, new]``, as many at a time as drafts get right."""
    widths = speculation.widths_for(len(input_ids), decoder.model)
    keys = tuple(getattr(draft, "key", type(draft)) for draft in speculation.drafts)
    pace = decoder.paces.setdefault((keys, widths, rules.sample), Pace(widths, len(input_ids)))
    request = Request(decoder, input_ids, mask, logits, rules, speculation.drafts, pace, speculation.stats)
    made = request.run()
    longest = max(map(len, made))
    return torch.tensor([row + [rules.pad] * (longest - len(row)) for row in made], device=input_ids.device)


def _speculation(asked: bool | Speculation, model: Any, batch: int, processed: bool) -> Speculation | None:
    """What was asked for; None if generation is to be plain, or if rows could not be judged by calls of several tokens.
    ``processed``: the caller's own processors shape logits."""
    if not isinstance(asked, bool | Speculation):
        raise TypeError(f"speculative is True, False or a skipc.Speculation, not {type(asked).__name__}")
    if asked is False:
        return None
    speculation = Speculation() if asked is True else asked
    speculation.stats = SpeculationStats()
    session = sessions.innermost(model)
    why = None
    if session is not None and session.steering is not None:
        why = "a policy decides by calls, of which there would be fewer"
    elif len(speculation.widths_for(batch, model)) == 1:
        why = "calls of so many rows take their own time, however few weights they share"
    elif batch > 1 and processed:
        why = "processors may look at all rows together, which would be at different tokens"
    elif batch > 1 and "position_ids" not in inspect.signature(model.forward).parameters:
        why = "the model takes no positions, so that rows cannot be at different tokens"
    if why is None:
        return speculation
    _plainly(speculation, why)
    return None


def _plainly(speculation: Speculation, why: str) -> None:
    speculation.stats.plain = why
    log.info("generate does not speculate: %s", why)


def target(compiled: Any) -> tuple[torch.nn.Module, Callable[..., Any]]:
    """The model, and what to call."""
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


@contextlib.contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[], None]]:
    if not shown:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("generating", total=total)
        yield lambda: bar.advance(task)
