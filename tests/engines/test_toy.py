"""The toy engine passes the suite that every engine passes."""

import pytest
import torch

from optimal_sampling import load
from optimal_sampling.config import MixtureConfig, ModelConfig, ToyOptions
from optimal_sampling.engines.toy import ToyEngine
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Request
from tests.engines.conformance import EngineConformance, Harness


class TestToyEngine(EngineConformance):
    @pytest.fixture
    def harness(self):
        tables = ToyEngine.random(MixtureConfig(), context_length=64).tables
        return Harness(
            open=lambda mixture, batch_size: ToyEngine.random(mixture, context_length=64),
            logits=lambda role, ids: tables[role][ids[-1]].double().numpy(),
            prompts=[([1, 2], [3]), ([4], [5, 1, 2]), ([2, 2, 2], [2])],
            context_length=64,
        )

    def test_load_opens_the_engine_of_its_options(self):
        """Guards: a vocabulary, mode or mixture that `load` does not hand on."""
        mixture = MixtureConfig(alpha_min=0.9)
        engine = load(ModelConfig(), mixture, ToyOptions(), mode="teacher")
        assert isinstance(engine, ToyEngine)
        assert (engine.mixture, engine.mode, engine.options) == (mixture, "teacher", ToyOptions())
        assert engine.vocab_size == engine.vocabulary.size > 256
        [done] = engine.generate([Request("a", 0, 0, (), (65,), 3)])
        assert done.error == ""
        assert set(done.trace["alpha"]) == {1.0}

    def test_tables_of_other_shapes_are_refused(self):
        """Guards: broadcasting one model over the other."""
        with pytest.raises(ConfigError, match="shapes"):
            ToyEngine(torch.zeros(3, 3), torch.zeros(4, 4), MixtureConfig())

    def test_nan_names_the_model_and_the_token(self):
        """Guards: NaN that becomes a token."""
        student, teacher = torch.zeros(3, 3), torch.zeros(3, 3)
        teacher[2] = float("nan")
        student[:, 2] = teacher[:2, 2] = 60.0
        [done] = ToyEngine(student, teacher, MixtureConfig()).generate(
            [Request("a", 0, 0, (1,), (1,), 5)]
        )
        assert done.finish_reason == "error"
        assert done.token_ids == (2,)
        assert "teacher" in done.error
        assert "token 1" in done.error
