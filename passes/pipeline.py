"""The one list of passes, in order."""

from __future__ import annotations

from skipc.passes.base import Pass
from skipc.passes.decompose_fast_paths import DecomposeFastPaths
from skipc.passes.find_sites import FindSites
from skipc.passes.functionalize_inplace import FunctionalizeInplace
from skipc.passes.remove_noops import RemoveNoops

PIPELINE: tuple[type[Pass], ...] = (
    DecomposeFastPaths,  # first: what it opens is cleaned by the passes after it
    RemoveNoops,  # before any matching, so that eval dropout and idle casts hide no sum
    FunctionalizeInplace,  # `h += f(h)` must be a value before streams are followed
    FindSites,  # analysis: after it, no pass may add or remove residual sums
)
