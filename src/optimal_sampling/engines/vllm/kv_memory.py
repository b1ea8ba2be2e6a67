"""Memory of layers with a sliding window, which vLLM would free before the window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, replace_as

__all__ = ["keep_whole_text"]


def keep_whole_text(specs: Mapping[str, Any], block_size: int) -> dict[str, Any]:
    """vLLM's memory of each layer by name, with windows in memory of `block_size` tokens a block.

    Layers still attend to their own windows. Layers share one kind of block, which names a single
    window: the shortest, by which vLLM tells that some layers have one.
    """
    kept = {name: _kept(spec, block_size) for name, spec in specs.items()}
    windows = [spec.sliding_window for spec in kept.values() if _has_window(spec)]
    return {
        name: replace(spec, sliding_window=min(windows)) if _has_window(spec) else spec
        for name, spec in kept.items()
    }


def _kept(spec: Any, block_size: int) -> Any:
    if type(spec) is not SlidingWindowSpec:
        return spec
    changes = {"block_size": block_size, "page_size_padded": None}
    return replace_as(spec, FullAttentionSpec, drop=("extra_retained_tokens",), **changes)


def _has_window(spec: Any) -> bool:
    return isinstance(spec, FullAttentionSpec) and spec.sliding_window is not None
