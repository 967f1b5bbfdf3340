"""How the CPU kernels read weights: what may be tuned about it, and the tables that tell them.

Linear layers of few rows (``kernels/cpu/products.h``) take the time of reading their weights. How far ahead these are
called into a cache (``AHEAD``, bytes; 0: not at all), and how many rows of them go together (``PAIR``), is constants of
compiled code, of which the kernels choose for each layer, when they are made, by a table that holds for the process.
Every choice gives the same bits.

In tables (:mod:`skipc.kernels.tables`) this is the kernel ``skinny_linear``. Its sizes are ``dtype_bits`` (16 or 32),
``rows`` of the input, and ``k`` and ``n``, columns and rows of the weights; weights that are read in one go (query, key
and value; gate and up) are one weight of all their rows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from skipc.kernels.library import library
from skipc.kernels.tables import Choice, Row, cpu_name, rows_of

from skipc.ir.errors import ConfigError

KERNEL = "skinny_linear"
SIZES = ("dtype_bits", "rows", "k", "n")
AHEAD = (0, 4096, 8192, 16384)
_LARGEST = 1 << 62

# Numbers of a row of the table: for each of SIZES the least and the largest, then AHEAD and PAIR.
library.define("tune_products(int[] rows) -> ()")  # of the C++ library alone


def default_for(rows: int) -> Choice:
    """What kernels do without a table (the constants of ``kernels/cpu/products.h``)."""
    return Choice(constants={"AHEAD": 8192, "PAIR": 2 if rows == 1 else 4})


def choices_for(rows: int) -> tuple[Choice, ...]:
    """All that there is for so many rows of the input. (Tiles of more rows than 4 would not fit into registers.)"""
    together = (1, 2, 4) if rows == 1 else (2, 4)
    return tuple(Choice(constants={"AHEAD": ahead, "PAIR": pair}) for ahead in AHEAD for pair in together)


@functools.cache
def source() -> str:
    """A hash of the code that reads weights, by which a table knows whether it was made for it."""
    folder = Path(__file__).parent / "cpu"
    text = "\0".join((folder / name).read_text() for name in ("common.h", "products.h", "products.cpp", "linear.h"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def use_tables() -> None:
    """Have kernels that are made from now on follow the tables of this CPU and number of threads. Called with the
    native kernels loaded; cheap if nothing has changed.

    Raises:
        ConfigError: for a file that is no table, or that asks for what the kernels cannot do, naming it.
    """
    rows = rows_of(KERNEL, source(), cpu_name())
    if rows is not _Told.rows and not _Told.held:
        _tell(rows, f"{cpu_name()}.json")
        _Told.rows = rows


@contextmanager
def using(rows: Sequence[Row]) -> Iterator[None]:
    """Kernels that are made in the block follow these rows instead. For tuners and tests: it holds for the process.

    Raises:
        ConfigError: for rows that ask for what the kernels cannot do.
    """
    _tell(rows, "a row")
    before, _Told.held = _Told.held, True
    try:
        yield
    finally:
        _Told.held = before
        _tell(_Told.rows, "a row")


class _Told:
    rows: tuple[Row, ...] = ()  # of tables, that the kernels know
    held = False  # whether they know others for now


def _tell(rows: Sequence[Row], name: str) -> None:
    numbers: list[int] = []
    for row in rows:
        if unknown := set(row.when) - set(SIZES):
            raise ConfigError(f"{name}: {KERNEL} has no size {sorted(unknown)[0]!r}, but {list(SIZES)}")
        ranges = [row.when.get(size, (0, _LARGEST)) for size in SIZES]
        possible = choices_for(1 if ranges[1][1] <= 1 else 2)
        if row.choice.constants not in [c.constants for c in possible]:
            several = "one row" if ranges[1][1] <= 1 else "several rows"
            shown = ", ".join(str(dict(c.constants)) for c in possible)
            raise ConfigError(f"{name}: {KERNEL} of {several} has no {dict(row.constants)}, but {shown}")
        numbers += [end for pair in ranges for end in pair]
        numbers += [row.constants["AHEAD"], row.constants["PAIR"]]
    torch.ops.skipc.tune_products(numbers)
