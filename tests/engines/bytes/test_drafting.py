"""Drafts change no byte, and save passes of the teacher."""

from dataclasses import replace

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.bytes.drafting import MeasuredChoice
from optimal_sampling.types import Request
from tests.engines.bytes.conftest import byte_engine, small_tokenizer, writing_model
from tests.engines.bytes.test_engine import requests
from tests.engines.conformance import by_key

FREE = MixtureConfig(alpha_min=0.0)


def all_of(completions):
    return {
        key: (c.token_ids, c.finish_reason, c.byte_level.text, c.byte_level.trace.columns)
        for key, c in by_key(completions).items()
    }


def drafting(engine, count):
    return engine.view(options=replace(engine.options, draft_tokens=count))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_drafts_change_nothing(pair_models, tokenizers, count):
    """Guards: a law of another context taken for the one that is wanted, a cache that holds a
    draft that was not drawn, noise of the draft used up.
    """
    plain = byte_engine(pair_models, tokenizers, FREE, draft_tokens=0)
    many = requests(9, new=12)
    expected = all_of(plain.generate(many))
    view = drafting(plain, count)
    assert all_of(view.generate(many)) == expected
    assert view.drafted > view.accepted > 0


def test_accepted_drafts_save_passes():
    """Guards: drafts with other noise than the text's, laws that are made and not used."""
    tokenizer = small_tokenizer()
    model = writing_model(1, tokenizer)
    plain = byte_engine((model, model), (tokenizer, tokenizer), FREE, draft_tokens=0)
    many = [Request(f"prompt {i}", 0, 0, (97, 98), (97, 98), 12) for i in range(4)]
    expected = all_of(plain.generate(many))
    before = plain.counts["teacher"].passes
    view = drafting(plain, 4)
    assert all_of(view.generate(many)) == expected
    assert view.counts["teacher"].passes < 0.5 * before
    assert view.accepted > 0.7 * view.drafted


def rounds_of(choice, plain, drafted, count):
    """Which rounds draft, where a round of each kind costs so many seconds per symbol."""
    kinds = []
    for _ in range(count):
        kinds.append(choice.drafts(True))
        symbols = 40 if kinds[-1] else 10
        choice.observe(symbols, symbols * (drafted if kinds[-1] else plain))
    return kinds


@pytest.mark.parametrize(("plain", "drafted", "expected"), [(1.0, 1.1, False), (1.1, 1.0, True)])
def test_auto_drafts_where_that_costs_less(plain, drafted, expected):
    """Guards: drafts that go on though they cost more, or stop though they save; a cost per round
    taken for one per symbol.
    """
    tried, kept = MeasuredChoice.TRIED, MeasuredChoice.KEPT
    kinds = rounds_of(MeasuredChoice(), plain, drafted, 2 * tried + kept)
    assert kinds[: 2 * tried] == [False] * tried + [True] * tried
    assert kinds[2 * tried :] == [expected] * kept


def test_rounds_that_are_not_measured_are_not_for_trying():
    """Guards: drafts tried for as long as new prompts come; prompts that end what pays."""
    choice = MeasuredChoice()
    rounds_of(choice, 1.1, 1.0, MeasuredChoice.TRIED)
    assert choice.drafts(True)
    assert not choice.drafts(False)
    rounds_of(choice, 1.1, 1.0, MeasuredChoice.TRIED)
    assert choice.drafts(False)


def test_auto_measures_again():
    """Guards: a choice made once, for texts and batches that change."""
    choice, tried = MeasuredChoice(), MeasuredChoice.TRIED
    first = rounds_of(choice, 1.0, 2.0, 2 * tried + MeasuredChoice.KEPT)
    then = rounds_of(choice, 2.0, 1.0, 2 * tried + 50)
    assert not any(first[2 * tried :])
    assert then[: 2 * tried] == [False] * tried + [True] * tried
    assert all(then[2 * tried :])


def test_auto_and_a_count_that_is_asked_for(pair_models, tokenizers):
    """Guards: a count that was asked for and is not kept; `auto` that tries drafts where a pass of
    the teacher costs no more than the student's.
    """
    engine = byte_engine(pair_models, tokenizers, FREE, draft_tokens="auto")
    assert engine.open_loop().drafter is None
    loop = drafting(engine, 2).open_loop()
    assert loop.drafter.count == 2
    assert all(rounds_of(loop.choice, 1.0, 2.0, 1000))
    larger = writing_model(3, tokenizers[1], layers=9, hidden_size=96)
    assert larger.num_parameters() > 4 * pair_models[0].num_parameters()
    loop = byte_engine((pair_models[0], larger), tokenizers, draft_tokens="auto").open_loop()
    assert loop.drafter.count == 4
    assert isinstance(loop.choice, MeasuredChoice)
