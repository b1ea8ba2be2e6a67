"""The engine of a worker: its share of the machine's memory."""

from __future__ import annotations

import psutil
import pytest

from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, ToyOptions
from optimal_sampling.engines.fleet.messages import Ready, Setup
from optimal_sampling.engines.fleet.serving import EngineServer
from optimal_sampling.version import __version__

GIB = 2**30


class Facts:
    """An engine that runs nothing; it has the options that it is given."""

    vocab_size, stop_ids, modes, captures, rounds = 6, {0}, {"mixture"}, (), None

    def __init__(self):
        self.seen = []

    def view(self, options):
        self.options = options
        self.seen.append(options)
        return self

    def notes(self):
        return {}


@pytest.fixture
def load(monkeypatch):
    """(options, memory and sharing) -> the options with which a worker's engine runs."""

    def load_it(options, **place):
        engine, sent = Facts(), []
        monkeypatch.setattr("optimal_sampling.engines.fleet.serving.open_engine", opens(engine))
        setup = Setup(ModelConfig(), MixtureConfig(), options, "mixture", __version__, **place)
        EngineServer(setup, sent.append).load()
        assert [type(event) for event in sent] == [Ready]
        return engine.options

    return load_it


def opens(engine):
    return lambda *arguments: engine


def test_a_given_budget_is_divided(load):
    """Guards: two workers on a machine that each take the caches which the user allows in all."""
    options = load(LocalOptions(kv_memory_gib=3.0), memory=8 * GIB, sharing=2)
    assert options.kv_memory_gib == 1.5


def test_caches_have_half_of_a_workers_own_memory(load):
    """Guards: the half of all free memory for every worker, two of which would take it all."""
    used = psutil.Process().memory_info().rss
    memory = used + 8 * GIB
    options = load(LocalOptions(), memory=memory, sharing=2)
    assert options.kv_memory_gib == pytest.approx(4.0, abs=0.5)
    assert load(LocalOptions(), memory=1).kv_memory_gib == 0.01


def test_an_engine_without_a_budget_is_left_alone(load):
    """Guards: an option that the engine does not have; a GPU's own share that is overridden."""
    assert load(ToyOptions(), memory=8 * GIB) == ToyOptions()
    assert load(LocalOptions(), memory=None).kv_memory_gib is None
