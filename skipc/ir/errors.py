"""Every error that skipc raises on purpose. Catch :class:`SkipcError` for all of them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The names of ``known`` closest to ``name``, best first; a name that contains ``name`` counts as close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    return (close + [k for k in known if name and name in k and k not in close])[:count]


class SkipcError(Exception):
    """Base of all errors raised by skipc."""


class ConfigError(SkipcError, ValueError):
    """An option is unknown, or its value is not allowed."""


class UnknownSiteError(SkipcError, KeyError):
    """A session, plan or route names a site that the compiled model does not have."""

    def __init__(self, name: str, known: Iterable[str]):
        known = list(known)
        close = nearest(name, known, 3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        super().__init__(f"no site is called {name!r}{hint} ({len(known)} sites: see skipc.find_sites(model, ...))")

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class PlanError(SkipcError, ValueError):
    """A plan asks for something that would give wrong answers, such as dropping keys that a caller keeps."""


class ProfileError(SkipcError, ValueError):
    """A calibration profile is damaged, of another version, or for another checkpoint."""


class AdapterError(SkipcError, ValueError):
    """An adapter is damaged, of a kind that is not supported, or for another model."""


class SessionError(SkipcError, RuntimeError):
    """A session could not be honoured. Raised rather than running something other than what was asked for."""


class SessionThreadError(SessionError):
    """A model with an open session was called from a thread that the session is not bound to."""


class FallbackError(SessionError):
    """A call under a session would have run plain Inductor, which can skip nothing."""


class AlreadyCompiledError(SkipcError, TypeError):
    """The module given to :func:`skipc.compile` is compiled already."""


class NoResidualStreamError(SkipcError, ValueError):
    """No residual stream was found in the traced graph."""


class VersionError(SkipcError, ImportError):
    """The installed torch is not one that this release of skipc was written for."""


class PassError(SkipcError, RuntimeError):
    """A pass broke an invariant of the graph. This is a bug of skipc: please report it with SKIPC_DUMP set."""
