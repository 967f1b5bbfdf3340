"""The options of skipc: one frozen, validated object, built from ``options={...}`` or keyword arguments."""

from __future__ import annotations

import hashlib
import json
from os import PathLike, fspath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_serializer

from skipc.ir.adapters import Bank
from skipc.ir.errors import ConfigError, nearest
from skipc.ir.program import KVPolicy

BUDGETS = {"balanced": 0.02, "fast": 0.10}  # loss that a preset may have


class Config(BaseModel):
    """How skipc compiles a model. Equal configs are equal objects, so that they never cause a recompilation.

    Raises:
        ConfigError: for an unknown key (naming the nearest known one) or a value that is not allowed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    preset: Literal["exact", "balanced", "fast", "off"] = Field(
        "exact",
        description="exact: sites are outlined and can be skipped by a session; without one every site runs. "
        "balanced, fast: without a session's own plan, calls run under the fastest plan of `profile` that loses at "
        "most 2 %, or 10 %. off: plain Inductor.",
    )
    profile: str | None = Field(
        None, description="Folder of the profile that presets balanced and fast take their plan from; see `calibrate`."
    )
    lowering: Literal["outline", "cond", "static"] = Field(
        "outline",
        description="How the graph becomes a program. outline: one compiled region per distinct sublayer, branches in "
        "host code. cond: one Inductor graph with a torch.cond around each site. static: one Inductor graph without "
        "the sites of `plan`.",
    )
    plan: tuple[str, ...] = Field((), description="Names of the sites that lowering='static' leaves out.")
    kv: KVPolicy = Field(
        "project",
        description="What a skipped attention writes to its KV cache. project: its keys and values, as if it ran. "
        "none: nothing (only where the cache is written in place). copy: those of the nearest attention below that ran "
        "and keeps its keys in the same form (the lowest one projects). backfill: nothing, until the session is to run "
        "an attention that lacks some; then skipc.generate runs the tokens concerned again, in full and together.",
    )
    compact_queries: bool = Field(
        False,
        description="Compile attentions over static caches for some of a prompt's tokens, too: where tokens decide for "
        "themselves (batch 1), only those that need it attend. One more region to compile.",
    )
    huge_pages: bool = Field(
        True,
        description="Ask Linux to move the weights of models on the CPU to huge pages, at the first call.",
    )
    graphs: bool = Field(
        True,
        description="On a GPU, capture the steps of skipc.generate as CUDA graphs, one for each plan that runs.",
    )
    disable_passes: tuple[str, ...] = Field((), description="Names of passes not to run; see `skipc passes`.")
    on_error: Literal["fallback", "raise"] = Field(
        "fallback",
        description="What a failure inside skipc does to a compilation. fallback: log it and use plain Inductor. "
        "raise: raise it.",
    )
    adapters: Any = Field(
        None,
        description="A skipc.AdapterBank of the model: linear layers add what the adapters that a session chooses say.",
    )
    mode: str | None = Field(None, description="An Inductor mode, as in torch.compile(mode=...).")
    inductor: dict[str, Any] = Field(
        default_factory=dict,
        description="Inductor options for every region, as in torch.compile(options=...).",
    )

    def __init__(self, **options: Any):
        for key in options:
            if key not in type(self).model_fields:
                close = nearest(key, type(self).model_fields)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
                raise ConfigError(f"unknown option {key!r}{hint}; known: {', '.join(type(self).model_fields)}")
        for key in ("disable_passes", "plan"):
            if isinstance(options.get(key), list | set | frozenset):
                options[key] = tuple(sorted(options[key]))
        if options.get("plan") and options.get("lowering") != "static":
            raise ConfigError("option 'plan' is for lowering='static'; elsewhere a session chooses what to skip")
        if options.get("preset") in BUDGETS:
            if not options.get("profile"):
                raise ConfigError(
                    f"preset {options['preset']!r} takes its plan from a profile: profile='folder', which "
                    "`skipc calibrate MODEL --out folder` or skipc.calibrate(...).save('folder') makes"
                )
            if options.get("lowering", "outline") != "outline":
                raise ConfigError(f"preset {options['preset']!r} needs lowering='outline'")
        elif options.get("profile"):
            raise ConfigError("option 'profile' is for presets 'balanced' and 'fast'")
        if options.get("adapters") is not None:
            if not isinstance(options["adapters"], Bank):
                raise ConfigError(f"option 'adapters' is a skipc.AdapterBank, not {type(options['adapters']).__name__}")
            if options.get("lowering", "outline") != "outline" or options.get("preset") == "off":
                raise ConfigError("option 'adapters' needs lowering='outline', and a preset that is not 'off'")
        if isinstance(options.get("profile"), PathLike):
            options["profile"] = fspath(options["profile"])
        try:
            super().__init__(**options)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise ConfigError(f"option {field!r}: {first['msg']} (got {first['input']!r})") from None

    @field_serializer("adapters", when_used="json")
    def _named(self, bank: Any) -> str | None:
        return None if bank is None else repr(bank)

    def __hash__(self) -> int:
        return hash(self.cache_key())

    def cache_key(self) -> str:
        """A digest of every field."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True, default=_digest).encode()).hexdigest()


def _digest(value: Any) -> Any:
    return id(value) if isinstance(value, Bank) else repr(value)


def list_options() -> dict[str, str]:
    """Every option with its type, default and meaning, in order."""
    return {
        name: f"{_type_name(field.annotation)} = {field.get_default(call_default_factory=True)!r}. {field.description}"
        for name, field in Config.model_fields.items()
    }


def _type_name(annotation: Any) -> str:
    if getattr(annotation, "__origin__", None) is Literal:
        return " | ".join(map(repr, annotation.__args__))
    return getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)  # type: ignore[return-value]
