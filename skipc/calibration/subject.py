"""What is calibrated: a model, text for it, and the sites that may be changed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from skipc.calibration.batches import Batch, batches_of, call_on, module_of
from skipc.calibration.chats import NoChatsError, chats
from skipc.calibration.checkpoint import bytes_of, checkpoint_digest, digests_of
from skipc.calibration.costs import Regime
from skipc.calibration.judging import is_causal
from skipc.calibration.text import calibration_windows
from skipc.calibration.thinning import drops_groups
from skipc.explanation import find_sites
from skipc.ir.errors import PlanError, UnknownSiteError
from skipc.ir.site import HiddenLayer, Site
from skipc.runtime.policies.base import Phase

log = logging.getLogger("skipc")

_TOKENS = 512  # in a window of the default text
_ROWS = 4  # that such a window makes where rows are texts of their own (encoders)
_HELD_OUT = 5  # of the user's batches, each fifth is judged on
_CHATS = "chats.safetensors"
_TEMPERATURE = 0.7  # of the answers in them: at 1 those of small models lose their thread


class Subject:
    """A model and its text.

    Args:
        windows: of the default text to judge by. Where there are chats, half of them are.
        chats: of the default text, conversations that the model writes itself if it can (see
            :func:`skipc.calibration.chats.chats`): so many to calibrate on, again and again among windows of
            documentation, of which there are more.
        kept: a folder that keeps them for the next Subject, in ``chats.safetensors``.
        progress: wraps an iterable, as ``tqdm`` or ``rich`` do.

    Attributes:
        given: batches to calibrate on; of each number of the first of them, a third are chats.
        judged: batches to judge by.
        kinds: of text that those are: ``documentation`` and ``chats``, or ``text`` that the user brought.
        decodes: whether the model generates text token by token.
        sites: all of them, by name, in order of execution.
        free: those that may be changed.
        layers: of those, neurons of MLPs and groups of heads of attentions.
        digests: of the parameters, by name.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        batches: Iterable[Any] | None,
        held_out: Iterable[Any] | None,
        tokenizer: Any,
        windows: int,
        seed: int,
        *,
        chats: int = 0,
        kept: str | Path | None = None,
        progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    ):
        if model.training:
            raise PlanError("the model is in training mode: call model.eval() first")
        self.model = model
        self.digests = digests_of(model)
        self.given: list[Batch]
        self.judged: list[Batch]
        self.kinds: list[str]
        self._kept, self._progress = Path(kept) / _CHATS if kept is not None else None, progress
        if batches is None:
            if tokenizer is None:
                raise TypeError("give batches, or a tokenizer for the English text that comes with Python")
            self._default_text(tokenizer, windows, seed, chats)
        else:
            self._given_text(batches, held_out)
            self.kinds = ["text"] * len(self.judged)
        causal = self._generates(self.given[0])
        self.decodes = causal and hasattr(model, "config") and not getattr(model.config, "is_encoder_decoder", False)
        self.sites: dict[str, Site] = {s.name: s for s in find_sites(model, **self.given[0].inputs).sites}
        self.free = dict(self.sites)
        # Whether it runs with fewer heads, if known. Prompts join caches of windows in ways of their own.
        self._drops: bool | None = False if self.decodes and _has_windows(model.config) else None

    def _default_text(self, tokenizer: Any, windows: int, seed: int, count: int) -> None:
        given, judged = calibration_windows(tokenizer, _TOKENS, windows, seed)
        written: list[torch.Tensor] = []
        if not self._generates(batches_of(self.model, [given[0][:, :8]])[0]):
            given, judged = ([_rows(w) for w in part] for part in (given, judged))
        elif count:
            written = self._chats(tokenizer, count + len(judged[::2]), seed)
        self.kinds = ["documentation"] * len(judged)
        if written:
            judged = judged[::2]
            self.kinds = ["documentation"] * len(judged) + ["chats"] * len(judged)
            own = written[len(judged) :]
            given = _interleaved(given, own * max(1, round(len(given) / (2 * count))))
            judged += written[: len(judged)]
        self.given, self.judged = batches_of(self.model, given), batches_of(self.model, judged)

    def _chats(self, tokenizer: Any, count: int, seed: int) -> list[torch.Tensor]:
        """So many chats, those that are kept if they are of the same making; none if the model cannot write any."""
        made_for = json.dumps({
            "checkpoint": checkpoint_digest(self.digests), "dtype": str(next(self.model.parameters()).dtype),
            "template": str(getattr(tokenizer, "chat_template", None)), "tokens": _TOKENS, "count": count, "seed": seed,
            "temperature": _TEMPERATURE,
        })  # fmt: skip
        if self._kept is not None and self._kept.exists():
            from safetensors import safe_open

            with safe_open(self._kept, "pt") as file:
                if (file.metadata() or {}).get("made_for") == made_for:
                    log.info("chats: taken from %s", self._kept)
                    return list(file.get_tensor("input_ids").split(1))
        try:
            written = chats(self.model, tokenizer, _TOKENS, count, seed, self._progress, _TEMPERATURE)
        except NoChatsError as error:
            log.info("no chats to calibrate on: %s", error)
            return []
        if self._kept is not None:
            from safetensors.torch import save_file

            self._kept.parent.mkdir(parents=True, exist_ok=True)
            part = self._kept.with_suffix(".part")  # gets its name when all is there
            save_file({"input_ids": torch.cat(written)}, part, {"made_for": made_for})
            part.rename(self._kept)
        return written

    def _given_text(self, batches: Iterable[Any], held_out: Iterable[Any] | None) -> None:
        self.given = batches_of(self.model, batches)
        if held_out is not None:
            self.judged = batches_of(self.model, held_out)
            return
        if len(self.given) < _HELD_OUT:
            raise TypeError(f"give {_HELD_OUT} batches or more, or batches to judge by as held_out")
        self.judged = self.given[_HELD_OUT - 1 :: _HELD_OUT]
        self.given = [b for i, b in enumerate(self.given) if i % _HELD_OUT != _HELD_OUT - 1]

    @torch.no_grad()
    def _generates(self, batch: Batch) -> bool:
        return is_causal(self.model, call_on(self.model, batch))

    def restrict(self, never: Iterable[str], kinds: Iterable[str] | None) -> None:
        """Leave some sites as they are: named ones, those of other kinds, and those that no module stands for alone.

        Raises:
            UnknownSiteError: for a name that no site has.
        """
        never, kinds = frozenset(never), None if kinds is None else frozenset(kinds)
        for name in sorted(never - self.sites.keys()):
            raise UnknownSiteError(name, self.sites)
        self.free = {}
        for name, site in self.sites.items():
            if name in never or (kinds is not None and site.kind.value not in kinds):
                continue
            if f"{name}#2" in self.sites:  # in eager, leaving out its module leaves out the others' too
                log.info("left as it is: %s runs several times", name)
                continue
            try:
                module_of(self.model, name)
            except PlanError as error:
                log.info("left as it is: %s", error)
            else:
                self.free[name] = site

    @property
    def layers(self) -> dict[str, HiddenLayer]:
        """Of the sites that may be changed, what can be left out of them one by one."""
        found = {n: s.hidden for n, s in self.free.items() if s.hidden is not None}
        grouped = {n: layer for n, layer in found.items() if layer.size > 1}
        if self._drops is None and grouped:
            self._drops = drops_groups(self.model, self.given[0], grouped)
        return {n: layer for n, layer in found.items() if layer.size == 1 or self._drops}

    def keep_heads(self) -> None:
        """Leave all attentions all their heads."""
        self._drops = False

    def regime(self, phase: Phase | None, batch: int, length: int, cache: int) -> Regime:
        """Calls of a kind; by default decode steps, and calls like the given ones where the model does not decode."""
        phase = phase or ("decode" if self.decodes else "prefill")
        if phase == "decode":
            if not self.decodes:
                raise PlanError(f"{type(self.model).__name__} does not decode: calibrate for phase='prefill'")
            return Regime("decode", batch, length, cache + length)
        first = next(v for v in self.given[0].inputs.values() if isinstance(v, torch.Tensor))
        tokens = length if length > 1 else (first.shape[1] if first.dim() > 1 else 1)
        return Regime("prefill", batch if batch > 1 else first.shape[0], tokens, tokens)

    def text_digest(self) -> str:
        """A digest of all batches."""
        made = hashlib.sha256()
        for batch in (*self.given, *self.judged):
            for name, value in sorted(batch.inputs.items()):
                made.update(name.encode())
                if isinstance(value, torch.Tensor):
                    made.update(bytes_of(value))
        return made.hexdigest()[:16]


def _has_windows(config: Any) -> bool:
    """Whether some attentions of a decoder see a part of the context only."""
    if hasattr(config, "get_text_config"):  # of a model of text and images, say
        config = config.get_text_config(decoder=True)
    return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))


def _interleaved(first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Both in their order, the shorter one evenly spread over the longer one."""
    placed = [((i + 0.5) / len(part), item) for part in (first, second) for i, item in enumerate(part)]
    return [item for _, item in sorted(placed, key=lambda p: p[0])]


def _rows(window: torch.Tensor) -> dict[str, torch.Tensor]:
    """A window of text as rows of their own."""
    ids = window.view(_ROWS, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
