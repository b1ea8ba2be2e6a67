"""Small engines that worker processes load, by the names of their options' classes."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

import numpy as np
import psutil

from optimal_sampling.config import LocalOptions, ToyOptions
from optimal_sampling.engines.base import Engine
from optimal_sampling.engines.toy import ToyEngine

CONTEXT = 64
AT_START = os.environ.get("CUDA_VISIBLE_DEVICES", "")


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


class FaultyTables(SmallTables):
    """The toy engine, but for prompts that name what goes wrong with them."""

    @classmethod
    def load(cls, models, mixture, options, vocabulary, mode="mixture"):
        engine = ToyEngine.load(models, mixture, ToyOptions(), vocabulary, mode)
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
        faulty = cls()
        faulty.__dict__ |= vars(engine)
        faulty.inner, faulty.options = engine, options
        return faulty

    def generate(self, requests):
        for request in requests:
            if request is not None:
                text = self.vocabulary.decode(request.student_prompt_ids)
                self.go_wrong(text)
                yield from self.inner.generate([request])

    def go_wrong(self, text):
        if "raises" in text:
            raise ValueError("a prompt that raises")
        if "hangs" in text:
            time.sleep(1000)
        if "exits" in text:
            os._exit(7)
        if "allocates" in text:
            np.ones(1 << 31)


@dataclass(frozen=True)
class FaultyTablesOptions(ToyOptions):
    engine_class = "tests.engines.fleet.engines:FaultyTables"


class Environment(SmallTables):
    """The toy engine; where a variable is set, it prints that and ends, and leaves a child."""

    @classmethod
    def load(cls, models, mixture, options, vocabulary, mode="mixture"):
        if text := os.environ["FLEET_TEST"]:
            if not os.fork():
                time.sleep(1000)
            print(text, flush=True)
            os._exit(9)
        engine = ToyEngine.random(mixture)
        engine.options = options
        engine.notes = lambda: {"visible": AT_START}
        return engine


@dataclass(frozen=True)
class EnvironmentOptions(ToyOptions):
    engine_class = "tests.engines.fleet.engines:Environment"
