"""Small engines that worker processes load, by the names of their options' classes."""

from __future__ import annotations

from dataclasses import dataclass

from optimal_sampling.config import LocalOptions, ToyOptions
from optimal_sampling.engines.base import Engine
from optimal_sampling.engines.toy import ToyEngine

CONTEXT = 64


class SmallTables(Engine):
    """The toy engine over six tokens."""

    @classmethod
    def load(cls, models, mixture, options, vocabulary, mode="mixture"):
        engine = ToyEngine.random(mixture, context_length=CONTEXT)
        engine.options = options
        return engine.view(mode=mode)


@dataclass(frozen=True)
class SmallTablesOptions(ToyOptions):
    engine_class = "tests.engines.fleet.engines:SmallTables"


class SmallModels(Engine):
    """The local engine with random models of a few dimensions."""

    captures = frozenset({"student_logits", "teacher_logits", "log_q"})

    @classmethod
    def load(cls, models, mixture, options, vocabulary, mode="mixture"):
        from tests.engines.local.conftest import engine_of, tiny_model

        engine = engine_of(tiny_model(1, layers=1), tiny_model(2, layers=3))
        engine.options = options
        return engine.view(mixture, mode)


@dataclass(frozen=True)
class SmallModelsOptions(LocalOptions):
    engine_class = "tests.engines.fleet.engines:SmallModels"
