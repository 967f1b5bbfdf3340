"""The one list of passes, in order: over the whole graph, then over each distinct region that was cut from it."""

from __future__ import annotations

from skipc.passes.base import Pass
from skipc.passes.decompose_fast_paths import DecomposeFastPaths
from skipc.passes.find_sites import FindSites
from skipc.passes.fold_grouped_queries import FoldGroupedQueries
from skipc.passes.functionalize_inplace import FunctionalizeInplace
from skipc.passes.fuse_lora import FuseLora
from skipc.passes.group_adapters import GroupAdapters
from skipc.passes.hoist_slices import HoistSlices
from skipc.passes.lower_attention import LowerAttention
from skipc.passes.lower_attention_block import LowerAttentionBlock
from skipc.passes.lower_copied_keys import LowerCopiedKeys
from skipc.passes.lower_gated_mlp import LowerGatedMLP
from skipc.passes.lower_linears import LowerLinears
from skipc.passes.narrow_kv_cache import NarrowKVCache
from skipc.passes.remove_noops import RemoveNoops
from skipc.passes.share_common_values import ShareCommonValues

PIPELINE: tuple[type[Pass], ...] = (
    DecomposeFastPaths,  # first: what it opens is cleaned by the passes after it
    RemoveNoops,  # before any matching, so that eval dropout and idle casts hide no sum
    FunctionalizeInplace,  # `h += f(h)` must be a value before streams are followed
    FuseLora,  # behind both: dropout and casts hide its form; a sum with an adapter is no residual sum
    HoistSlices,  # behind these: what it looks for must be a value, with nothing idle in between
    ShareCommonValues,  # before narrowing, which finds one range for each mask
    FoldGroupedQueries,  # before narrowing, which reads its form; both look through whole layers
    NarrowKVCache,  # over the whole graph: one range serves every layer
    FindSites,  # analysis: after it, no pass may add or remove residual sums
)

REGION_PIPELINE: tuple[type[Pass], ...] = (
    LowerAttention,
    LowerGatedMLP,  # before linears, which would take it apart
    LowerLinears,  # by region: what is grouped into one call is what that region needs
    LowerAttentionBlock,  # behind these: it joins what they made
    LowerCopiedKeys,
    GroupAdapters,
)
