"""The engine with models that run with their own cache."""

import pytest
import torch

from optimal_sampling.engines.local.shrinking import POSITIONS, VOCAB, small_model
from optimal_sampling.engines.local.stock_runner import StockRunner
from optimal_sampling.errors import ConfigError, ModelError
from tests.engines.conformance import EngineConformance
from tests.engines.local import families
from tests.engines.local.conftest import engine_of, tiny_model, vocabulary
from tests.engines.local.test_engine import harness_of

pytestmark = pytest.mark.filterwarnings("ignore")


def recurrent(seed):
    return tiny_model(
        seed, kind="Mamba2", scale=0.2, num_heads=8, head_dim=8, n_groups=1, state_size=8
    )


class TestRecurrent(EngineConformance):
    """A recurrent student and a hybrid teacher, through the whole suite."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        return harness_of(recurrent(1), tiny_model(2, kind="Bloom", n_head=4, n_layer=2))


def test_one_model_may_be_native():
    """Guards: pairs of which only one has a cache of its own."""
    engine = engine_of(recurrent(1), tiny_model(2))
    assert isinstance(engine.pair.runners["student"], StockRunner)
    assert not isinstance(engine.pair.runners["teacher"], StockRunner)
    assert "in 0 of its 2 layers" in engine.notes()["attention"]


def test_drafts_are_refused_where_they_cannot_be_taken_back():
    """Guards: an option that is ignored without a word."""
    engine = engine_of(recurrent(1), tiny_model(2), draft_tokens=4)
    with pytest.raises(ConfigError, match="runs with its own cache"):
        list(engine.generate([]))


def test_a_model_that_neither_way_is_right_is_refused():
    """Guards: a fallback that is wrong too."""
    vocab = vocabulary(VOCAB, context=POSITIONS)
    wrong = small_model(*families.config_of("doge"), torch.float32)
    with pytest.raises(ModelError, match="it cannot run with its own cache"):
        engine_of(wrong, wrong, vocab=vocab)
