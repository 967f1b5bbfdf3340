"""Tables of constants for kernels: which tile sizes a kernel is compiled with, for which sizes of its operands, on
which device.

A table is a JSON file named after the device's architecture (``sm_90.json``), or after a CPU. Those that come with
skipc lie in ``configs/`` beside this file; ``skipc autotune`` writes others to ``SKIPC_TABLES`` (default: ``tables`` in
the folder of :func:`skipc.kernels.native.cache_dir`), and these go first. For each kernel it has the hash of the code
that it was made for, and rows in order::

    {"format": 1, "arch": "sm_90", "kernels": {"lora_rows": {"source": "0123456789ab", "rows": [
        {"when": {"k": [1, 2048]}, "constants": {"BLOCK_N": 64, "BLOCK_K": 256}, "warps": 4, "stages": 2},
        {"when": {}, "constants": {"BLOCK_N": 128, "BLOCK_K": 512}, "warps": 4, "stages": 3}]}}}

The first row all of whose ranges hold the sizes is taken. Rows for other code are not.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from skipc.kernels.native import cache_dir

from skipc.ir.errors import ConfigError

log = logging.getLogger("skipc.kernels")
SHIPPED = Path(__file__).parent / "configs"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Choice(_Strict):
    """Constants of a kernel, and for Triton how many warps a program has and how many loads are under way."""

    constants: Mapping[str, int]
    warps: Annotated[int, Field(ge=1, le=32)] = 4
    stages: Annotated[int, Field(ge=1, le=8)] = 2

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.constants.items())), self.warps, self.stages))


class Row(Choice):
    """A choice, and the ranges of sizes that it is for, both ends included."""

    when: Mapping[str, tuple[int, int]] = {}

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether it is for these sizes."""
        return all(low <= sizes[name] <= high for name, (low, high) in self.when.items())

    @property
    def choice(self) -> Choice:
        """Without the ranges."""
        return Choice(constants=self.constants, warps=self.warps, stages=self.stages)

    @model_validator(mode="after")
    def _ordered(self) -> Row:
        for name, (low, high) in self.when.items():
            if low > high:
                raise ValueError(f"{name}: {low} to {high} is no range")
        return self


class Entry(_Strict):
    """What a table says of a kernel. ``source``: the hash of the code that it is for."""

    source: str
    rows: tuple[Row, ...]


class Table(_Strict):
    """What is known of one kind of device. ``measured``: on which one, if it was."""

    format: Literal[1] = 1
    arch: str
    measured: str | None = None
    kernels: Mapping[str, Entry]

    @classmethod
    def read(cls, path: Path) -> Table:
        """The table in a file.

        Raises:
            ConfigError: if it is none, naming what is wrong and where.
        """
        try:
            table = cls.model_validate_json(path.read_text())
        except (ValidationError, OSError) as error:
            raise ConfigError(f"{path} is no table of kernels: {error}") from error
        if table.arch != path.stem:
            raise ConfigError(f"{path} is a table for {table.arch}: name it {table.arch}.json")
        return table

    def write(self, path: Path) -> None:
        """Keep it in a file, which others see whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")
        scratch.replace(path)

    def find(self, kernel: str, source: str, sizes: Mapping[str, int]) -> Choice | None:
        """What it says, if anything.

        Raises:
            ConfigError: for a row that chooses by a size that the kernel does not have.
        """
        entry = self.kernels.get(kernel)
        if entry is None or entry.source != source:
            return None
        for row in entry.rows:
            unknown = set(row.when) - set(sizes)
            if unknown:
                raise ConfigError(f"{self.arch}.json: {kernel} has no size {sorted(unknown)[0]!r}, but {list(sizes)}")
            if row.holds(sizes):
                return row.choice
        return None


def folder() -> Path:
    """Where tables are that were measured on this machine."""
    return Path(os.environ.get("SKIPC_TABLES") or cache_dir() / "tables")


@functools.cache
def tables_of(arch: str) -> tuple[Table, ...]:
    """The tables for a kind of device, those of this machine first. They are read once."""
    paths = (folder() / f"{arch}.json", SHIPPED / f"{arch}.json")
    return tuple(Table.read(path) for path in paths if path.exists())


@functools.cache
def choose(kernel: str, source: str, default: Choice, arch: str, sizes: tuple[tuple[str, int], ...]) -> Choice:
    """The constants that tables give a kernel for these sizes on such a device; ``default``, if none does.

    Raises:
        ConfigError: for a row with other constants than the kernel's.
    """
    tables = tables_of(arch)
    for table in tables:
        found = table.find(kernel, source, dict(sizes))
        if found is not None and found.constants.keys() != default.constants.keys():
            raise ConfigError(f"{arch}.json: {kernel} takes {list(default.constants)}, not {list(found.constants)}")
        if found is not None:
            return found
        if kernel in table.kernels and table.kernels[kernel].source != source:
            _say_other_code(kernel, arch)
    if not tables:
        _say(f"no table of kernels for {arch}: safe defaults are used; `skipc autotune` measures better ones")
    return default


@functools.cache
def rows_of(kernel: str, source: str, arch: str) -> tuple[Row, ...]:
    """All rows that tables have for this code of a kernel, in their order: for kernels that choose by themselves."""
    rows: list[Row] = []
    entries = [table.kernels[kernel] for table in tables_of(arch) if kernel in table.kernels]
    for entry in entries:
        rows += entry.rows if entry.source == source else ()
    if entries and not rows:
        _say_other_code(kernel, arch)
    return tuple(rows)


def _say_other_code(kernel: str, arch: str) -> None:
    _say(f"the table of {kernel} for {arch} is for other code than this: run `skipc autotune` again")


@functools.cache
def _say(text: str) -> None:  # once
    log.warning("%s", text)


def forget() -> None:
    """Read tables anew."""
    for cached in (tables_of, rows_of, choose, _say):
        cached.cache_clear()


def cpu_name() -> str:
    """The name of the table of this CPU, as many threads as torch uses."""
    from skipc.kernels.native import cpu_fingerprint

    return f"cpu-{cpu_fingerprint()}-{torch.get_num_threads()}"
