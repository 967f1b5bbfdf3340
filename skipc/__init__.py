"""skipc: a torch.compile backend that lets transformer inference skip sublayers, and says what it skipped.

Importing this package is cheap: everything is loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipc.adapters.adapter import Adapter, LoRA, merge_adapters
    from skipc.adapters.bank import AdapterBank
    from skipc.adapters.router import AdapterRouter
    from skipc.calibration.calibrate import calibrate
    from skipc.calibration.drafting import FoundDraft, find_draft
    from skipc.calibration.profile import Profile
    from skipc.explanation import Explanation, explain, find_sites
    from skipc.ir.config import Config, list_options
    from skipc.ir.errors import (
        AdapterError,
        AlreadyCompiledError,
        ConfigError,
        FallbackError,
        NoResidualStreamError,
        PassError,
        PlanError,
        ProfileError,
        SessionError,
        SessionThreadError,
        SkipcError,
        UnknownSiteError,
        VersionError,
    )
    from skipc.ir.gating import GateTable
    from skipc.ir.plan import Plan
    from skipc.ir.replacement import Affine, LowRank
    from skipc.ir.route import Route
    from skipc.ir.site import Reason, Rejection, Site, SiteKind, SiteReport
    from skipc.model import CompiledModel, compile, session
    from skipc.packaging import package
    from skipc.runtime.generation import generate
    from skipc.runtime.hugging_face import generation_mode
    from skipc.runtime.policies import (
        AdaSkip,
        Call,
        EarlyExit,
        FFNSkip,
        Lagged,
        Observe,
        Policy,
        PredictionExit,
        Routed,
        SkipDecode,
        Static,
        Unified,
        Worthwhile,
    )
    from skipc.runtime.session_stats import SessionStats
    from skipc.runtime.sessions import Session
    from skipc.runtime.speculation.adaptive import AdaptiveDraft
    from skipc.runtime.speculation.drafts import Draft, ModelDraft, PromptLookup, Proposal
    from skipc.runtime.speculation.memory import NGramCache
    from skipc.runtime.speculation.self_draft import SelfDraft
    from skipc.runtime.speculation.settings import Speculation, SpeculationStats

__version__ = "0.1.0"

_HOME = {
    "skipc.adapters.adapter": ["Adapter", "LoRA", "merge_adapters"],
    "skipc.adapters.bank": ["AdapterBank"],
    "skipc.adapters.router": ["AdapterRouter"],
    "skipc.calibration.calibrate": ["calibrate"],
    "skipc.calibration.drafting": ["FoundDraft", "find_draft"],
    "skipc.calibration.profile": ["Profile"],
    "skipc.explanation": ["Explanation", "explain", "find_sites"],
    "skipc.ir.config": ["Config", "list_options"],
    "skipc.ir.errors": [
        "AdapterError", "AlreadyCompiledError", "ConfigError", "FallbackError", "NoResidualStreamError", "PassError",
        "PlanError", "ProfileError", "SessionError", "SessionThreadError", "SkipcError", "UnknownSiteError",
        "VersionError",
    ],
    "skipc.ir.site": ["Reason", "Rejection", "Site", "SiteKind", "SiteReport"],
    "skipc.model": ["CompiledModel", "compile", "session"],
    "skipc.packaging": ["package"],
    "skipc.runtime.generation": ["generate"],
    "skipc.runtime.hugging_face": ["generation_mode"],
    "skipc.ir.gating": ["GateTable"],
    "skipc.ir.plan": ["Plan"],
    "skipc.ir.replacement": ["Affine", "LowRank"],
    "skipc.ir.route": ["Route"],
    "skipc.runtime.policies": [
        "AdaSkip", "Call", "EarlyExit", "FFNSkip", "Lagged", "Observe", "Policy", "PredictionExit", "Routed",
        "SkipDecode", "Static", "Unified", "Worthwhile",
    ],
    "skipc.runtime.session_stats": ["SessionStats"],
    "skipc.runtime.sessions": ["Session"],
    "skipc.runtime.speculation.adaptive": ["AdaptiveDraft"],
    "skipc.runtime.speculation.drafts": ["Draft", "ModelDraft", "PromptLookup", "Proposal"],
    "skipc.runtime.speculation.memory": ["NGramCache"],
    "skipc.runtime.speculation.self_draft": ["SelfDraft"],
    "skipc.runtime.speculation.settings": ["Speculation", "SpeculationStats"],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "AdaSkip", "Adapter", "AdapterBank", "AdapterError", "AdapterRouter", "AdaptiveDraft", "Affine",
    "AlreadyCompiledError", "Call", "CompiledModel", "Config", "ConfigError", "Draft", "EarlyExit", "Explanation",
    "FFNSkip", "FallbackError", "FoundDraft", "GateTable", "Lagged", "LoRA", "LowRank", "ModelDraft", "NGramCache",
    "NoResidualStreamError", "Observe", "PassError", "Plan", "PlanError", "Policy", "PredictionExit", "Profile",
    "ProfileError", "PromptLookup", "Proposal", "Reason", "Rejection", "Route", "Routed", "SelfDraft", "Session",
    "SessionError", "SessionStats", "SessionThreadError", "Site", "SiteKind", "SiteReport", "SkipDecode",
    "SkipcError", "Speculation", "SpeculationStats", "Static", "Unified", "UnknownSiteError", "VersionError",
    "Worthwhile", "calibrate", "compile", "explain", "find_draft", "find_sites", "generate", "generation_mode",
    "list_options", "merge_adapters", "package", "session",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'skipc' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
