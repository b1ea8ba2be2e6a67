"""Engines turn requests into completions. Each is imported when it is opened."""

from __future__ import annotations

from importlib import import_module

from optimal_sampling.config import EngineOptions, LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.engines.base import Engine
from optimal_sampling.engines.bytes.options import check_byte_options
from optimal_sampling.errors import ConfigError, TokenizerMismatchError
from optimal_sampling.types import Mode
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["Engine", "check_pair", "load", "open_engine"]


def load(
    models: ModelConfig,
    mixture: MixtureConfig | None = None,
    engine: EngineOptions | None = None,
    mode: Mode = "mixture",
) -> Engine:
    """Two models and what their vocabularies share, in the engine that the options belong to.

    By default the local engine. The engine's `vocabulary` encodes prompts and decodes completions.
    Raises ModelError, ConfigError, TokenizerMismatchError, MissingDependencyError.
    """
    if not isinstance(models, ModelConfig):
        raise ConfigError(
            "models must be a ModelConfig, such as "
            f"ModelConfig(teacher='toy-teacher', student='toy-student'), got {models!r}"
        )
    vocabulary = Vocabulary.load(
        models.student,
        models.teacher,
        models.trust_remote_code,
        revisions=models.revisions,
        granularity=models.granularity,
    )
    return open_engine(
        engine or LocalOptions(), models, mixture or MixtureConfig(), vocabulary, mode
    )


def open_engine(
    options: EngineOptions,
    models: ModelConfig,
    mixture: MixtureConfig,
    vocabulary: Vocabulary,
    mode: Mode = "mixture",
) -> Engine:
    """The engine that the options belong to, its models loaded.

    With two tokenizers, that of bytes. The student alone has only one.

    Raises ModelError, ConfigError, TokenizerMismatchError, MissingDependencyError.
    """
    check_pair(options, models, mixture, vocabulary, mode)
    is_byte = vocabulary.granularity_of(mode) == "byte"
    engine_path = options.byte_engine_class if is_byte else options.engine_class
    module, name = engine_path.split(":")
    engine_class = getattr(import_module(module), name)
    if mode not in engine_class.modes:
        known = ", ".join(sorted(engine_class.modes))
        raise ConfigError(f"the engine {options.name} has no mode {mode!r}; it has: {known}")
    engine: Engine = engine_class.load(models, mixture, options, vocabulary, mode)
    return engine


def check_pair(
    options: EngineOptions,
    models: ModelConfig,
    mixture: MixtureConfig,
    vocabulary: Vocabulary,
    mode: Mode,
) -> None:
    """Raise where two tokenizers cannot be mixed so: before models are loaded.

    TokenizerMismatchError for an engine that mixes tokens, ConfigError for options of tokens.
    """
    if vocabulary.granularity_of(mode) == "token":
        return
    if not options.byte_engine_class:
        why = f"student {models.student!r} and teacher {models.teacher!r} have different tokenizers"
        if models.granularity == "byte":
            why = "granularity byte asks for bytes"
        raise TokenizerMismatchError(
            f"the engine {options.name} mixes tokens, and {why}: use the engine local, which mixes "
            "models byte by byte (docs/tokenizers.md)"
        )
    check_byte_options(mixture, options, mode)
