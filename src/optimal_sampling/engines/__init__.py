"""Engines turn requests into completions. Each is imported when it is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimal_sampling.config import EngineConfig, MixtureConfig, ModelConfig
from optimal_sampling.engines.base import Engine
from optimal_sampling.errors import ConfigError

if TYPE_CHECKING:
    from optimal_sampling.vocabulary import Vocabulary

__all__ = ["ENGINES", "Engine", "open_engine"]

ENGINES = ("local", "vllm", "toy")


def open_engine(
    name: str,
    models: ModelConfig,
    mixture: MixtureConfig,
    options: EngineConfig,
    vocabulary: Vocabulary,
    **specific: Any,
) -> Engine:
    """The engine of this name, its models loaded. Raises ConfigError for an unknown name, and what loading raises."""
    if name == "local":
        from optimal_sampling.engines.local.engine import LocalEngine

        return LocalEngine.load(models, mixture, options, vocabulary, **specific)
    if name == "vllm":
        from optimal_sampling.engines.vllm.engine import VllmEngine

        return VllmEngine.load(models, mixture, options, vocabulary, **specific)
    if name == "toy":
        from optimal_sampling.engines.toy import ToyEngine

        return ToyEngine.random(mixture, vocabulary.size, vocabulary.stop_ids, **specific)
    raise ConfigError(f"unknown engine {name!r}; the engines are: {', '.join(ENGINES)}")
