"""Rounds with drafts queued before the tokens of the one before are known: the same texts."""

import dataclasses

import pytest
import torch

from optimal_sampling.engines.local.drafting import FixedDrafts
from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.types import Request
from tests.engines.conformance import by_key
from tests.engines.local.conftest import tiny_model, vocabulary
from tests.engines.local.paged.test_paged_engine import paged_engine
from tests.engines.local.paged.test_running_ahead import outcome, requests_of, same_as_in_turn

pytestmark = pytest.mark.usefixtures("flash_on_cpu")


@pytest.fixture(scope="module")
def models():
    """Alike enough for some drafts to be accepted, and some not."""
    teacher = tiny_model(2, layers=2)
    student = tiny_model(2, layers=2)
    for i, parameter in enumerate(student.parameters()):
        generator = torch.Generator().manual_seed(i)
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return student, teacher


@pytest.mark.parametrize("draft_tokens", [1, 2, 4, 8])
def test_stops_limits_and_admissions_change_nothing(models, draft_tokens):
    """Guards: positions, noise or a last token that are not those after the accepted drafts."""
    for batch_size, recorded in ((1, True), (3, False), (16, True)):
        options = {"batch_size": batch_size, "recorded": recorded, "draft_tokens": draft_tokens}
        engine = same_as_in_turn(models, requests_of(), **options)
        assert 0 < engine.draft_counts.accepted < engine.draft_counts.drafted


def test_most_rounds_of_long_texts_are_queued_ahead(models):
    """Guards: rounds that wait for the host although nothing but their tokens is open."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    options = {"vocab": vocab, "batch_size": 4, "draft_tokens": 3}
    engine = same_as_in_turn(models, requests_of(4, new=(60,)), **options)
    counts = engine.draft_counts
    assert counts.drafted > 2 * counts.accepted / 2 > 0
    assert counts.ahead > 0.8 * counts.rounds
