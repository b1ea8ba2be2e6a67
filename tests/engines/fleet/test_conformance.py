"""A fleet passes the suite that every engine passes."""

from dataclasses import replace

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.toy import ToyEngine
from tests.engines.conformance import EngineConformance, Harness
from tests.engines.fleet.engines import CONTEXT, SmallModelsOptions, SmallTablesOptions
from tests.engines.local.conftest import CONTEXT as MODELS_CONTEXT
from tests.engines.local.conftest import stock_logits, tiny_model
from tests.engines.local.test_engine import PROMPTS


class TestFleetOfToyEngines(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, open_small):
        tables = ToyEngine.random(MixtureConfig(), context_length=CONTEXT).tables
        fleet = open_small(SmallTablesOptions())
        return Harness(
            open=lambda mixture, batch_size: fleet.view(mixture),
            logits=lambda role, ids: tables[role][ids[-1]].double().numpy(),
            prompts=[([1, 2], [3]), ([4], [5, 1, 2]), ([2, 2, 2], [2])],
            context_length=CONTEXT,
            samples=1500,
        )


@pytest.mark.slow
class TestFleetOfLocalEngines(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, open_small):
        stock = {
            "student": stock_logits(tiny_model(1, layers=1)),
            "teacher": stock_logits(tiny_model(2, layers=3)),
        }
        fleet = open_small(SmallModelsOptions())
        return Harness(
            open=lambda mixture, batch_size: fleet.view(
                mixture, options=replace(fleet.options, batch_size=batch_size)
            ),
            logits=lambda role, ids: stock[role](ids),
            prompts=PROMPTS,
            context_length=MODELS_CONTEXT,
        )
