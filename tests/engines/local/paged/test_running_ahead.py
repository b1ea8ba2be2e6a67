"""Rounds queued before the tokens of the one before are known: the same texts as without."""

import dataclasses

import pytest
import torch

from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.types import Request
from tests.engines.conformance import by_key
from tests.engines.local.conftest import tiny_model, vocabulary
from tests.engines.local.paged.test_paged_engine import paged_engine

pytestmark = pytest.mark.usefixtures("flash_on_cpu")


@pytest.fixture(scope="module")
def models():
    return tiny_model(1, layers=1), tiny_model(2, layers=2)


def requests_of(count=12, new=(3, 20, 9, 1)):
    """Prompts and limits of different lengths, so that texts end in different rounds."""
    return [
        Request(str(i), 0, 0, (1, 2, 3)[: 1 + i % 3], (4, 5) * (1 + i % 4), new[i % len(new)])
        for i in range(count)
    ]


def outcome(engine, requests):
    """Tokens, ends and diagnostics; the last digits of these depend on the rows beside a text."""
    done = by_key(engine.generate(requests))
    assert len(done) == len(requests)
    return {
        key: (c.token_ids, c.finish_reason, c.error, Traces(c.trace.columns))
        for key, c in done.items()
    }


class Traces(dict):
    """Columns that are equal up to the last digits."""

    def __eq__(self, other):
        return {k: pytest.approx(v, rel=1e-4, abs=1e-4, nan_ok=True) for k, v in other.items()} == (
            dict(self)
        )

    __hash__ = None


def same_as_in_turn(models, requests, **options):
    """Compare, and give the engine that ran ahead."""
    options = {"draft_tokens": 0, **options}
    in_turn = paged_engine(*models, **options)
    expected = outcome(in_turn, requests)
    assert in_turn.draft_counts.ahead == 0
    engine = paged_engine(*models, ahead=True, **options)
    assert outcome(engine, requests) == expected
    assert engine.draft_counts.ahead > 0
    return engine


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("recorded", [False, True])
def test_stops_limits_and_admissions_change_nothing(models, batch_size, recorded):
    """Guards: a token drawn for a text that had ended; noise or positions one token behind."""
    engine = same_as_in_turn(models, requests_of(), batch_size=batch_size, recorded=recorded)
    reasons = {c.finish_reason for c in engine.generate(requests_of())}
    assert reasons == {"stop", "length"}


def test_one_set_of_weights(models):
    """Guards: the last token of another row where a cache has two contexts per row."""
    same_as_in_turn((models[1], models[1]), requests_of(8), batch_size=3)


@pytest.mark.parametrize("mode", ["student", "teacher"])
def test_one_model_alone(models, mode):
    """Guards: a round of one model that feeds the tokens of the round before last."""
    expected = outcome(paged_engine(*models, batch_size=3).view(mode=mode), requests_of(8))
    view = paged_engine(*models, ahead=True, batch_size=3).view(mode=mode)
    assert outcome(view, requests_of(8)) == expected
    assert view.draft_counts.ahead > 0


def test_both_models_at_once(models):
    """Guards: a round beside another whose tokens it has to wait for, by the path of a GPU."""

    def side_by_side(engine):
        make = engine._new_loop

        def new_loop():
            loop = make()
            loop.sampler.overlap.works = True
            return loop

        engine._new_loop = new_loop
        return engine

    options = {"draft_tokens": 0, "batch_size": 4}
    expected = outcome(paged_engine(*models, **options), requests_of())
    engine = side_by_side(paged_engine(*models, ahead=True, **options))
    assert outcome(engine, requests_of()) == expected
    assert engine.draft_counts.ahead > 0


def test_preemption_and_growth_of_pages():
    """Guards: a row that moves while a round ahead reads it; memory that a preemption should free.

    Texts cross the end of a page, and all of them do not fit at once.
    """
    changes = {"max_position_embeddings": 3000}
    models = [tiny_model(seed, layers=1, **changes) for seed in (1, 2)]
    vocab = dataclasses.replace(vocabulary(context=3000), stop_ids=frozenset())
    requests = [
        Request(str(n), 0, 0, tuple([2, 3, 5] * n)[:n], (1, 4), 12) for n in (250, 252, 254, 500, 3)
    ]
    per_token = sum(r.bytes_per_token for r in paged_engine(*models).pair.runners.values())
    for pages, preempts in ((5, True), (40, False)):
        memory = (pages + 1.5) * PAGE * per_token / 2**30
        engine = same_as_in_turn(models, requests, vocab=vocab, kv_memory_gib=memory, batch_size=5)
        assert (engine.loop.scheduler.preemptions > 0) == preempts


def test_bad_logits_end_their_text_only(models):
    """Guards: NaN that a round ahead writes for a row with bad logits, and a later text reads."""
    broken = tiny_model(2, layers=2)
    broken.model.embed_tokens.weight.data[11] = torch.nan
    bad = [Request(f"bad {i}", 0, 0, (1, 2), (1, 11, 2), 8) for i in range(2)]
    requests = [bad[0], *requests_of(4), bad[1], *requests_of(12)[4:]]
    for batch_size in (1, 3):
        engine = same_as_in_turn((models[0], broken), requests, batch_size=batch_size)
        done = by_key(engine.generate(requests))
        assert {done[r.id, 0].finish_reason for r in bad} == {"error"}
        assert "stop" in {c.finish_reason for c in done.values()}
        for runner in engine.pair.runners.values():
            for memory in runner.released[0].memories():
                assert not memory[PAGE:].isnan().any()


def test_a_run_given_up_while_a_round_is_queued(models):
    """Guards: rows of an abandoned run, or what its last round wrote, in the next one."""
    engine = paged_engine(*models, ahead=True, draft_tokens=0, batch_size=4)
    expected = outcome(engine, requests_of())
    for taken in (1, 3):
        stream = engine.generate(requests_of())
        for _ in range(taken):
            next(stream)
        stream.close()
        assert outcome(engine, requests_of()) == expected


def test_rounds_with_drafts_or_captures_do_not_run_ahead(models):
    """Guards: logits that the next round has overwritten; drafts of a text that is not known."""
    for options in ({"draft_tokens": 3}, {"draft_tokens": 0, "top_tokens": 2}):
        engine = paged_engine(*models, ahead=True, batch_size=4, **options)
        outcome(engine, requests_of(4))
        assert engine.draft_counts.ahead == 0


def test_a_text_alone_wastes_no_round_at_its_limit(models):
    """Guards: a round for a text that is known to end with the one before."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    engine = paged_engine(*models, vocab=vocab, ahead=True, draft_tokens=0)
    outcome(engine, requests_of(1, new=(10,)))
    assert (engine.draft_counts.rounds, engine.draft_counts.ahead) == (10, 8)
    assert engine.notes()["ahead"].startswith("8 of 10 rounds")
