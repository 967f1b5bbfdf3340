"""``skipc.generate`` as a generation mode of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from skipc.runtime.generation import generate, target
from skipc.runtime.speculation.settings import Speculation

_KNOWN = ("MaxLengthCriteria", "EosTokenCriteria")
# What transformers prepares of tokens and mask, and skipc by itself.
_OWN = ("attention_mask", "cache", "past_key_values", "position_ids", "cache_position", "use_cache", "logits_to_keep")


def generation_mode(
    compiled: Any, speculative: bool | Speculation = True, streamer: Any = None
) -> Callable[..., torch.Tensor]:
    """A decoding method for ``model.generate(..., custom_generate=...)``: transformers makes processors, criteria and
    masks of its generation config, and skipc generates.

    Args:
        compiled: what :func:`skipc.compile` or ``torch.compile(model, backend="skipc")`` made of ``model``.
        speculative: see :func:`skipc.generate`.
        streamer: one of transformers'. (``model.generate``, as of 5.24, hands its own on to no callable.)

    Raises:
        ValueError: when called for something that it does not do: another model, inputs beside tokens and their mask,
            scores or attentions as outputs, beams, a cache that the caller has filled, or for several rows stopping
            criteria of the caller's.
    """

    def decode(
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        if model is not target(compiled)[0]:
            raise ValueError("skipc generates with the model that was compiled, and this is another")
        _check(generation_config, model_kwargs)
        more = [c for c in stopping_criteria if type(c).__name__ not in _KNOWN]
        if more and len(input_ids) > 1:
            raise ValueError(f"for several rows skipc knows no {', '.join(type(c).__name__ for c in more)}")
        known = input_ids
        if streamer is not None:
            streamer.put(input_ids.cpu())

        def on_token(tokens: torch.Tensor) -> bool:
            nonlocal known
            if streamer is not None:
                streamer.put(tokens.cpu())
            if not more:
                return False
            known = torch.cat([known, tokens[:, None]], 1)
            return any(bool(c(known, None).all()) for c in more)

        made = generate(
            compiled,
            input_ids,
            max_new_tokens=generation_config.max_length - input_ids.shape[1],
            attention_mask=model_kwargs.get("attention_mask"),
            do_sample=bool(generation_config.do_sample),
            logits_processor=list(logits_processor),
            eos_token_id=generation_config.eos_token_id,
            pad_token_id=generation_config.pad_token_id,
            on_token=on_token if streamer is not None or more else None,
            speculative=speculative,
        )
        if streamer is not None:
            streamer.end()
        return made

    return decode


def _check(config: Any, given: dict[str, Any]) -> None:
    asked = [name for name in ("return_dict_in_generate", "output_scores", "output_attentions", "output_hidden_states")
             if getattr(config, name, False)]  # fmt: skip
    if (config.num_beams or 1) > 1:
        asked.append("num_beams")
    if asked:
        raise ValueError(f"skipc generates tokens alone, without {', '.join(asked)}")
    more = sorted(name for name, value in given.items() if value is not None and name not in _OWN)
    if more:
        raise ValueError(f"skipc generates from tokens and their mask alone, without {', '.join(more)}")
    cache = given.get("past_key_values", given.get("cache"))
    if cache is not None and getattr(cache, "get_seq_length", lambda: 0)() > 0:
        raise ValueError("skipc generates on a cache of its own: it cannot go on from one that is filled already")
