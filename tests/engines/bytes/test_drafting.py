"""Drafts change no byte, and save passes of the teacher."""

from dataclasses import replace

import pytest

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.bytes.drafting import ByteDrafter
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


def test_drafts_stop_where_too_few_are_drawn():
    """Guards: drafts that cost more than they save, for the whole run; a count that was asked for
    and is not kept.
    """
    drafter = ByteDrafter({}, None, None, {}, 4)
    drafter.drafted = 1000
    assert drafter.pays(0)
    drafter.adapts = True
    assert drafter.pays(600)
    assert not drafter.pays(400)
    drafter.drafted = 100
    assert drafter.pays(0)
