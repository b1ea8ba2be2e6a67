"""Fleets of small engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimal_sampling.config import FleetConfig, MixtureConfig, ModelConfig
from optimal_sampling.engines.fleet import open_fleet
from optimal_sampling.vocabulary import Vocabulary

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def vocabulary():
    models = ModelConfig()
    return Vocabulary.load(models.student, models.teacher)


@pytest.fixture(scope="module")
def open_small(vocabulary, tmp_path_factory):
    """(options, workers, mixture) -> a fleet; closed after the module's tests."""
    opened = []

    def open_it(options, workers=2, mixture=None, **fleet):
        config = FleetConfig(workers=workers, **fleet)
        logs = tmp_path_factory.mktemp("logs")
        models = ModelConfig(device="cpu")
        engine = open_fleet(
            options, models, mixture or MixtureConfig(), vocabulary, fleet=config, logs=logs
        )
        opened.append(engine)
        return engine

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))  # the workers import the small engines from here
        yield open_it
        for engine in opened:
            engine.close()
