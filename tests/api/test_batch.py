"""`BatchSampler` on the toy engine: what a further class for lists of prompts can count on."""

import pytest

from optimal_sampling import load
from optimal_sampling.api.batch import BatchSampler
from optimal_sampling.config import MixtureConfig, ModelConfig, PromptConfig, ToyOptions
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.prompts import PromptRenderer


class ToySampler(BatchSampler):
    def __init__(self):
        models = ModelConfig()
        super().__init__(models)
        self._engine = load(models, MixtureConfig(), ToyOptions())

    def generate(self, pairs, seed=0):
        self._check_open()
        renderer = PromptRenderer(PromptConfig(chat_template=False), self.vocabulary)
        return self._sample(self._engine, renderer, pairs, seed, 6)


def test_a_class_over_another_engine():
    """Guards: rows in the order of finishing, a prompt that fails for all, equal texts for equal
    prompts."""
    with ToySampler() as sampler:
        with pytest.warns(UserWarning, match="1 of 4 prompts failed; prompt 1: the teacher's") as w:
            rows = sampler.generate([("a", "b"), ("a", ""), ("a", "b"), ("c", "d")])
        assert w[0].filename == __file__
        assert [row.finish_reason for row in rows] == ["length", "error", "length", "length"]
        assert [len(row.token_ids) for row in rows] == [6, 0, 6, 6]
        assert rows[0].token_ids != rows[2].token_ids
        assert rows[1].trace["alpha"] == ()
        [alone] = sampler.generate([("c", "d")])
        assert alone.token_ids == rows[3].token_ids
    with pytest.raises(EngineError, match="this ToySampler is closed"):
        sampler.generate([("a", "b")])


@pytest.mark.parametrize("models", ["toy-teacher", None, {}])
def test_load_says_what_to_pass(models):
    """Guards: an AttributeError for the name of a model in the place of a ModelConfig."""
    with pytest.raises(ConfigError, match=r"models must be a ModelConfig, such as .*, got"):
        load(models)
