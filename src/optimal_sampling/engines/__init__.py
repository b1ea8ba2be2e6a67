"""Engines turn requests into completions. Each is imported when it is opened."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from optimal_sampling.config import EngineOptions, MixtureConfig, ModelConfig
from optimal_sampling.engines.base import Engine
from optimal_sampling.types import Mode

if TYPE_CHECKING:
    from optimal_sampling.vocabulary import Vocabulary

__all__ = ["Engine", "open_engine"]


def open_engine(
    options: EngineOptions,
    models: ModelConfig,
    mixture: MixtureConfig,
    vocabulary: Vocabulary,
    mode: Mode = "mixture",
) -> Engine:
    """The engine that the options belong to, its models loaded.

    Raises ModelError, ConfigError, MissingDependencyError.
    """
    module, name = options.engine_class.split(":")
    engine_class = getattr(import_module(module), name)
    engine: Engine = engine_class.load(models, mixture, options, vocabulary, mode)
    return engine
