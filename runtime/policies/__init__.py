"""Policies: when a session skips what. Each is one small file; :mod:`skipc.runtime.policies.base` is the protocol."""

from skipc.runtime.policies.adaskip import AdaSkip
from skipc.runtime.policies.base import Call, Policy
from skipc.runtime.policies.early_exit import EarlyExit
from skipc.runtime.policies.ffn_skip import FFNSkip
from skipc.runtime.policies.lagged import Lagged
from skipc.runtime.policies.prediction_exit import PredictionExit
from skipc.runtime.policies.router import Routed
from skipc.runtime.policies.skip_decode import SkipDecode
from skipc.runtime.policies.static import Observe, Static
from skipc.runtime.policies.unified import Unified
from skipc.runtime.policies.worthwhile import Worthwhile

__all__ = [
    "AdaSkip",
    "Call",
    "EarlyExit",
    "FFNSkip",
    "Lagged",
    "Observe",
    "Policy",
    "PredictionExit",
    "Routed",
    "SkipDecode",
    "Static",
    "Unified",
    "Worthwhile",
]
