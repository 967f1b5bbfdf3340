"""Adapters of one model, side by side in memory that never moves, so that choosing among them compiles nothing."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from skipc.adapters.adapter import Adapter
from skipc.adapters.arranging import Arranged, Arranger
from skipc.adapters.modes import Decision, Mode
from skipc.adapters.router import AdapterRouter
from skipc.adapters.slots import Loaded, allocated, targets_of, write
from skipc.ir.adapters import Wanted
from skipc.ir.errors import AdapterError, nearest
from skipc.kernels.lora import MOST
from skipc.kernels.routing import MOST_EXPERTS, places

_TABLE = 2 + 65536  # places for slots of rows, in a table
Row = str | None | Mapping[str, float]
Rows = str | Mapping[str, float] | Sequence[Row] | AdapterRouter


@dataclass(eq=False)
class Lease:
    """What the rows of a session want, kept in its slots until :meth:`release`.

    Attributes:
        bank: that it is of.
        rows: how many rows it is for; None if every row of a call wants the same.
        paths: layers that its adapters change, each with the name of such an adapter.
        wanted: as programs take it.
        arranged: how the adapters run.
    """

    bank: AdapterBank
    rows: int | None
    paths: Mapping[str, str]
    wanted: Wanted
    arranged: Arranged = Arranged(())  # noqa: RUF009
    _held: list[Loaded] = field(default_factory=list)

    def release(self) -> None:
        """Let others have the slots."""
        self.bank._release(self)


class AdapterBank:
    """LoRA adapters of ``model`` for ``skipc.compile(model, adapters=bank)``: rows of one call choose among those that
    are loaded (``compiled.session(adapters=["a", None, "b"])``), and nothing is compiled when they are loaded,
    unloaded, replaced or chosen.

    Any number of adapters can be loaded; up to ``slots`` at a time lie where kernels read them, those that open
    sessions use among them. A session that needs another puts it in the place of the one that was used longest ago.

    Args:
        model: not wrapped by PEFT, with its weights on the CPU, or on one GPU. It stays as it is.
        slots: places for adapters that are in use.
        max_rank: of a layer. Memory that adapters leave unused is not taken from the system.
        targets: layers that adapters may change: paths, or the ends of paths (``"q_proj"``). None: all linear layers
            (and GPT-2's Conv1D) but the one that makes logits.
        when_full: what a session does that needs a slot when open sessions use all. ``"refuse"`` raises; ``"wait"``
            waits until one closes, at most ``timeout`` seconds.
        calls: that a session is expected to make, where the mode of its adapters is ``"auto"``.

    Raises:
        AdapterError: for targets that the model does not have, or of a kind that is not supported.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        slots: int = 8,
        max_rank: int = 64,
        targets: Iterable[str] | None = None,
        when_full: Literal["refuse", "wait"] = "refuse",
        timeout: float = 60.0,
        calls: int = 256,
    ):
        if slots < 1 or max_rank < 1:
            raise AdapterError(f"a bank has a slot and a rank or more, not {slots} and {max_rank}")
        if when_full not in ("refuse", "wait"):
            raise AdapterError(f"when_full is 'refuse' or 'wait', not {when_full!r}")
        if hasattr(model, "peft_config"):
            raise AdapterError("give the bank the base model, not PEFT's: model.unload(), or get_base_model() of a "
                               "model that no adapter was put into")  # fmt: skip
        self._model = weakref.ref(model)
        self.slots, self.max_rank, self.when_full, self.timeout = slots, max_rank, when_full, timeout
        paths = targets_of(model, None if targets is None else list(targets))
        self.layers = allocated(model, paths, slots, max_rank)
        self.nobody = self.blank()
        self._loaded: dict[str, Loaded] = {}
        self._in_slots: dict[int, Loaded] = {}  # by slot, the one that was used longest ago first
        self._changed = threading.Condition()
        self._tables: list[Wanted] = []  # of released leases, to be used again
        self.switches = 0  # how often an adapter was put into a slot
        self._arranger = Arranger(self._alive, self.layers, self._changed, when_full, timeout, calls)

    # -- what is loaded -----------------------------------------------------------------------------------------------

    def load(self, name: str, source: Adapter | str | Path | Any) -> None:
        """Have an adapter ready under ``name``: an :class:`Adapter`, a folder that PEFT saved, or a ``peft.PeftModel``
        whose adapter is called so (or whose only one it is). One of that name is replaced; sessions that are open go on
        with the one that they began with.

        Raises:
            AdapterError: if the bank cannot hold it, or it is of a kind that is not supported.
        """
        adapter = self._read(name, source)
        self._check(adapter)
        with self._changed:
            old = self._loaded.get(name)
            self._loaded[name] = Loaded(adapter)
            if old is not None:
                self._forget(old)

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            AdapterError: if there is none of that name, or an open session uses it.
        """
        with self._changed:
            loaded = self._find(name)
            if loaded.users:
                raise AdapterError(f"adapter {name!r} is in use by {loaded.users} open session(s)")
            del self._loaded[name]
            self._forget(loaded)

    def enable(self, name: str, enabled: bool = True) -> None:
        """Switch an adapter on or off for sessions that are opened from now on: off, its rows get the base model."""
        with self._changed:
            self._find(name).enabled = enabled

    @property
    def model(self) -> torch.nn.Module | None:
        """Whose layers they are; None once it is gone."""
        return self._model()

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for."""
        return tuple(self._loaded)

    @property
    def resident(self) -> tuple[str, ...]:
        """The adapters that lie in slots, the one that was used longest ago first."""
        return tuple(loaded.adapter.name for loaded in self._in_slots.values())

    def __repr__(self) -> str:
        used = f"{len(self._in_slots)} of {self.slots} slots"
        return f"AdapterBank({len(self._loaded)} adapters, {used}, {len(self.layers)} layers, rank {self.max_rank})"

    # -- sessions -----------------------------------------------------------------------------------------------------

    def lease(self, rows: Rows, mode: Mode = "unmerged") -> Lease:
        """Slots for what each row of a call wants: a name, None for the base model, or names with a factor for each; or
        one of these for all rows; or a router, which decides for each token.

        Args:
            rows: these.
            mode: see :mod:`skipc.adapters.modes`. ``"auto"``: what takes the least time.

        Raises:
            AdapterError: for a name that is not loaded, if there are not enough slots, and for a mode that does not go
                with such rows, or with what other sessions have merged.
        """
        if mode not in get_args(Mode):
            raise AdapterError(f"the mode of adapters is one of {', '.join(map(repr, get_args(Mode)))}, not {mode!r}")
        if isinstance(rows, AdapterRouter):
            return self._routed(rows, mode)
        every = isinstance(rows, str | Mapping)
        each: Sequence[Row] = [rows] if isinstance(rows, str | Mapping) else rows
        wanted = [_factors(row) for row in each]
        held, table = self._held(name for row in wanted for name in row)
        made = Lease(self, None if every else len(wanted), _paths(held), table, _held=list(held.values()))
        on = [{held[name]: f for name, f in row.items() if held[name].enabled} for row in wanted]
        try:
            made.arranged = self._arranger.arrange(on, mode)
            _fill(table, [{loaded.place: f for loaded, f in row.items()} for row in made.arranged.wishes])
        except BaseException:
            self._release(made)
            raise
        return made

    def _routed(self, router: AdapterRouter, mode: Mode) -> Lease:
        if mode not in ("unmerged", "auto"):
            raise AdapterError(f"adapters of a router run unmerged, not {mode!r}: each token wants others")
        if router.top_k > MOST:
            raise AdapterError(f"a token wants {router.top_k} adapters, and {MOST} are possible")
        if places(len(router.experts), router.width) > len(self.nobody.router):
            raise AdapterError(
                f"{router} is larger than those that this bank takes: {MOST_EXPERTS} experts of the width of its layers"
            )
        held, table = self._held(name for name in router.experts if name is not None)
        packed = router.packed({name: loaded.slot for name, loaded in held.items() if loaded.enabled})
        table.router[: len(packed)] = packed
        return Lease(self, None, _paths(held), table, _held=list(held.values()))

    def explain(self, rows: Rows) -> Decision:
        """How a session with these adapters would run them in mode ``"auto"``, and what other modes would take."""
        lease = self.lease(rows)
        try:
            with self._changed:
                return self._arranger.cheapest(lease.arranged.wishes)[0]
        finally:
            lease.release()

    def _alive(self) -> torch.nn.Module:
        if (model := self.model) is None:
            raise AdapterError("the model of this bank is gone")
        return model

    # -- slots --------------------------------------------------------------------------------------------------------

    def _held(self, names: Iterable[str]) -> tuple[dict[str, Loaded], Wanted]:
        """These adapters in slots, until they are released; and a table in which nobody wants anything."""
        with self._changed:
            held = self._hold({name: self._find(name) for name in names})
            made = self._tables.pop() if self._tables else self.blank()
        made.table[0] = made.router[0] = 0
        return held, Wanted(*made.tensors)  # another one, although it lies where that of an earlier lease did

    @torch.inference_mode(False)
    def blank(self) -> Wanted:
        """See :class:`skipc.ir.adapters.Bank`."""
        width = max((layer.shape[1] for layer in self.layers.values()), default=0)
        device = next((layer.memory.device for layer in self.layers.values()), None)
        table, gates = (torch.zeros(_TABLE, dtype=d, device=device) for d in (torch.int64, torch.float32))
        return Wanted(table, gates, torch.zeros(places(MOST_EXPERTS, width), device=device))

    def _hold(self, asked: dict[str, Loaded]) -> dict[str, Loaded]:
        """Have all that is asked for in slots, and keep it there."""
        if len({id(loaded) for loaded in asked.values()}) > self.slots:
            raise AdapterError(f"a session wants {len(asked)} adapters at a time, and the bank has {self.slots} slots")
        deadline = time.monotonic() + self.timeout
        while True:
            missing = [loaded for loaded in asked.values() if loaded.slot is None]
            kept = {id(loaded) for loaded in asked.values()}
            free = [s for s in range(self.slots) if s not in self._in_slots]
            idle = [s for s, loaded in self._in_slots.items() if not loaded.users and id(loaded) not in kept]
            if len(missing) <= len(free) + len(idle):
                break
            if self.when_full == "refuse" or not self._changed.wait(max(0.0, deadline - time.monotonic())):
                waited = f" ({self.timeout:g} seconds were waited)" if self.when_full == "wait" else ""
                raise AdapterError(
                    f"no slot is free for {missing[0].adapter.name!r}: open sessions use "
                    f"{self.slots - len(free) - len(idle)} of {self.slots}{waited}"
                )
            asked = {name: self._find(name) for name in asked}  # replaced or gone meanwhile
        for loaded, slot in zip(missing, free + idle, strict=False):
            self._put(loaded, slot)
        for loaded in asked.values():
            loaded.users += 1
            assert loaded.slot is not None
            self._in_slots[loaded.slot] = self._in_slots.pop(loaded.slot)  # the last to go
        return asked

    def _put(self, loaded: Loaded, slot: int) -> None:
        old = self._in_slots.pop(slot, None)
        if old is not None:
            old.slot = None
        write(self.layers.values(), slot, self.slots, loaded.adapter)
        self._in_slots[slot], loaded.slot = loaded, slot
        self.switches += 1

    def _release(self, lease: Lease) -> None:
        with self._changed:
            for loaded in lease._held:
                loaded.users -= 1
                if not loaded.users and self._loaded.get(loaded.adapter.name) is not loaded:
                    self._forget(loaded)
            if lease._held:
                self._tables.append(lease.wanted)
            self._arranger.end(lease.arranged)
            lease._held, lease.arranged = [], Arranged(())
            self._changed.notify_all()

    def _forget(self, loaded: Loaded) -> None:
        """Give up the slot of an adapter that nobody can ask for any more, unless a session still uses it."""
        if loaded.slot is not None and not loaded.users:
            del self._in_slots[loaded.slot]
            loaded.slot = None

    # -- loading ------------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> Loaded:
        if name not in self._loaded:
            close = nearest(name, self._loaded)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            known = ", ".join(map(repr, self._loaded)) or "none"
            raise AdapterError(f"no adapter is loaded as {name!r}{hint}; loaded: {known}")
        return self._loaded[name]

    def _read(self, name: str, source: Any) -> Adapter:
        if isinstance(source, Adapter):
            return Adapter(name, source.layers, source.weights)
        if isinstance(source, str | Path):
            return Adapter.load(source, name)
        configs = getattr(source, "peft_config", {})
        found = Adapter.of(source, name if name in configs or len(configs) != 1 else next(iter(configs)))
        return Adapter(name, found.layers, found.weights)

    def _check(self, adapter: Adapter) -> None:
        adapter.check(self._alive())
        if adapter.weights:
            raise AdapterError(
                f"adapter {adapter.name!r} has a value of its own for {next(iter(adapter.weights))}, which rows cannot "
                "choose; skipc.merge_adapters runs it for all of them"
            )
        for path, layer in adapter.layers.items():
            if layer.bias is not None:
                raise AdapterError(f"adapter {adapter.name!r} has a bias of its own for {path}, which rows cannot "
                                   "choose; skipc.merge_adapters runs it for all of them")  # fmt: skip
            if path not in self.layers:
                raise AdapterError(
                    f"adapter {adapter.name!r} changes {path}, which is no target of the bank: AdapterBank(model, "
                    f"targets=[..., {path!r}])"
                )
            if layer.rank > self.max_rank:
                raise AdapterError(
                    f"adapter {adapter.name!r} has rank {layer.rank} at {path}, and the bank's max_rank is "
                    f"{self.max_rank}"
                )


def _fill(table: Wanted, rows: Sequence[Mapping[int | None, float]]) -> None:
    """Say in a table what rows want, by slot."""
    most = max((len(row) for row in rows), default=0)
    if most > MOST:
        raise AdapterError(f"a row wants {most} adapters, and {MOST} are possible")
    count = len(rows) * most
    if count > _TABLE - 2:
        raise AdapterError(f"{len(rows)} rows of {most} adapters are more than {_TABLE - 2}")
    slots = [[*row, *[-1] * (most - len(row))] for row in rows]
    gates = [[*row.values(), *[0.0] * (most - len(row))] for row in rows]
    table.table[:2] = torch.tensor([len(rows) if most else 0, most])
    table.table[2 : 2 + count] = torch.tensor(slots, dtype=torch.int64).flatten()
    table.gates[2 : 2 + count] = torch.tensor(gates, dtype=torch.float32).flatten()


def _paths(held: Mapping[str, Loaded]) -> dict[str, str]:
    return {path: name for name, loaded in held.items() if loaded.enabled for path in loaded.adapter.layers}


def _factors(row: Row) -> dict[str, float]:
    if row is None:
        return {}
    if isinstance(row, str):
        return {row: 1.0}
    if isinstance(row, Mapping):
        return {name: float(factor) for name, factor in row.items()}
    raise TypeError(f"a row wants a name, None, or names with factors, not {row!r}")
