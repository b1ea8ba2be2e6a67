"""`bench bytes`: the naive method draws the same texts, and the numbers are those of the run."""

import pytest

from optimal_sampling.bench import byte_level
from optimal_sampling.bench.byte_level import CoverEngine
from optimal_sampling.bench.harness import Report
from optimal_sampling.bench.subcommands import BytesOptions
from optimal_sampling.config import ModelConfig
from optimal_sampling.errors import ConfigError
from tests.engines.bytes.conftest import byte_engine, pair_models, tokenizers
from tests.engines.bytes.test_drafting import all_of
from tests.engines.bytes.test_engine import requests

__all__ = ["pair_models", "tokenizers"]


def test_the_naive_method_draws_the_same_texts(pair_models, tokenizers):
    """Guards: a comparison with something that does not do the same, or that runs a model on less
    than the cover at every byte.
    """
    engine = byte_engine(pair_models, tokenizers, draft_tokens=0)
    naive = CoverEngine(engine.pair, engine.mixture, engine.options, engine.vocabulary)
    many = requests(6, new=10)
    assert all_of(naive.generate(many)) == all_of(engine.generate(many))
    for role, counts in naive.counts.items():
        assert counts.contexts >= naive.symbols
        assert counts.contexts > 1.2 * engine.counts[role].contexts


def test_all_that_the_subcommand_reports():
    """Guards: a row of the tables that no run makes, a number that is not of its run."""
    options = BytesOptions(
        models=ModelConfig(student="toy-number-student", device="cpu"),
        num_prompts=2,
        tolerances=(0.01,),
        prefixes=12,
        replay_bytes=6,
        compared_prompts=1,
        repeats=1,
    )
    report = Report()
    byte_level.run(options, report)
    plain, four, auto, naive = report.results[:4]
    assert [cost["drafts"] for cost in report.results[:4]] == [0, 4, "auto", 0]
    assert len({cost["bytes"] for cost in report.results[:4]}) == 1
    assert naive["student_contexts_per_token"] > 1.5 * plain["student_contexts_per_token"]
    assert four["teacher_passes"] < auto["teacher_passes"] <= plain["teacher_passes"]
    assert report.results[4]["prefixes"] == 12
    levels = report.results[5:]
    assert [(each["level"], each["drafts"]) for each in levels] == [
        (level, drafts) for level in ("token", "byte") for drafts in (0, 4, "auto")
    ]
    assert all(each["to_tokens"] == 1 for each in levels[:3])


def test_one_tokenizer_is_refused():
    """Guards: numbers of a comparison of a pair with itself."""
    options = BytesOptions(models=ModelConfig(device="cpu"))
    with pytest.raises(ConfigError, match="have one tokenizer"):
        byte_level.run(options, Report())
