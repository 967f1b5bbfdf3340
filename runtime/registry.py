"""What was compiled in this process, and for which model: models are known by the identities of their parameters."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from skipc.ir.site import Site

if TYPE_CHECKING:
    from skipc.runtime.program import Program

_programs: weakref.WeakKeyDictionary[Program, frozenset[int]] = weakref.WeakKeyDictionary()
_compiled: Counter[frozenset[int]] = Counter()


def register(program: Program, parameters: Iterable[int]) -> None:
    """Remember a new program and the parameters that it was compiled for."""
    _programs[program] = frozenset(parameters)


def note_compilation(parameters: Iterable[int]) -> None:
    """Count one run of the compiler for a model."""
    _compiled[frozenset(parameters)] += 1


def compilations(parameters: frozenset[int]) -> int:
    """How often graphs of a model were compiled."""
    return sum(n for used, n in _compiled.items() if not parameters or used <= parameters)


def known_sites(parameters: frozenset[int]) -> dict[str, Site]:
    """The sites of a model by name, as far as it is compiled."""
    known = [p.spec.sites for p, used in list(_programs.items()) if used and used <= parameters]
    return {site.name: site for sites in known for site in sites}
