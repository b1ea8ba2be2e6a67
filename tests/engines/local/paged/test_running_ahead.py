"""Rounds queued before the tokens of the one before are known: the same texts as without."""

import dataclasses
import time

import pytest
import torch

from optimal_sampling.engines.local.drafting import DraftPolicy
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


class Turns(DraftPolicy):
    """Five plain rounds after every one with drafts, whatever they cost."""

    left = 0

    def forced(self):
        return 4

    def plain_next(self, rows):
        self.left -= self.left > 0
        return self.left > 0

    def observe_drafts(self, confidences, accepted, tried):
        self.left = 6


class Plain(DraftPolicy):
    """Could draft, and never does; keeps what plain rounds have cost."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def plain_next(self, rows):
        return True

    def observe_plain(self, rows, seconds):
        self.seconds.append(seconds)


def in_turns(models, overlap=False, **options):
    """An engine that drafts and runs ahead in turns; `overlap`: by the path of a GPU."""
    engine = paged_engine(*models, ahead=True, draft_tokens="auto", **options)
    make = engine._new_loop

    def new_loop():
        loop = make()
        loop.sampler.overlap.works = overlap
        return loop

    engine._policy, engine._new_loop = Turns, new_loop
    return engine


def both_kinds(engine):
    """Whether it drafted and ran ahead."""
    return engine.draft_counts.drafted > 0 and engine.draft_counts.ahead > 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_drafts_and_rounds_ahead_in_turns_change_nothing(models, overlap, recorded):
    """Guards: drafts for a text whose last token is not known; noise of another round's width."""
    for batch_size in (1, 3, 16):
        options = {"batch_size": batch_size, "recorded": recorded}
        expected = outcome(paged_engine(*models, draft_tokens=0, **options), requests_of())
        engine = in_turns(models, overlap, **options)
        assert outcome(engine, requests_of()) == expected
        assert both_kinds(engine)


def test_looked_up_drafts_and_rounds_ahead_in_turns(models):
    """Guards: an index of the text that lacks the tokens of plain rounds."""
    pair = (models[1], models[1])
    requests = [dataclasses.replace(r, teacher_prompt_ids=(4, 5, 6) * 5) for r in requests_of(8)]
    expected = outcome(paged_engine(*pair, draft_tokens=0, batch_size=3), requests)
    engine = in_turns(pair, batch_size=3)
    assert outcome(engine, requests) == expected
    assert both_kinds(engine)


def test_a_row_that_is_computed_again_forgets_its_round_ahead(models):
    """Guards: an error, or tokens, of a round ahead over keys that a draft has spoilt."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    options, requests = {"vocab": vocab, "batch_size": 4}, requests_of(6, new=(30,))
    expected = outcome(paged_engine(*models, draft_tokens=0, **options), requests)
    engine = in_turns(models, **options)
    make, calls = engine._new_loop, []

    def new_loop():
        loop = make()
        sample = loop.sampler.sample

        def spoiling(plan, rows, before=None):
            calls.append(before is not None)
            if sum(calls) == 5 and calls[-1]:
                cache = loop.models[1].cache
                for memory in cache.memories():
                    memory[cache.manager.starts[2]] = torch.nan
            return sample(plan, rows, before)

        loop.sampler.sample = spoiling
        return loop

    engine._new_loop = new_loop
    assert outcome(engine, requests) == expected
    assert not any(error for _, _, error, _ in expected.values())
    assert both_kinds(engine)


def test_auto_tries_plain_rounds_and_measures_them(models):
    """Guards: `auto` that never runs ahead; a round's seconds that overlap those of the next."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    requests = requests_of(4, new=(50, 70))
    options = {"vocab": vocab, "batch_size": 4}
    expected = outcome(paged_engine(*models, draft_tokens=0, **options), requests)
    engine = paged_engine(*models, ahead=True, draft_tokens="auto", **options)
    assert outcome(engine, requests) == expected
    assert both_kinds(engine)
    assert engine.loop.policy.plain.known

    engine._policy = Plain
    started, slept = time.perf_counter(), 0.0
    for _ in engine.generate(requests):
        before = time.perf_counter()
        time.sleep(0.05)
        slept += time.perf_counter() - before
    seconds = engine.loop.policy.seconds
    assert 0 < sum(seconds) <= time.perf_counter() - started - slept
    assert len(seconds) > engine.draft_counts.rounds / 2


def test_auto_captures_without_running_ahead(models):
    """Guards: logits that the next round has overwritten."""
    engine = in_turns(models, overlap=True, batch_size=4, top_tokens=2)
    outcome(engine, requests_of(4))
    assert engine.draft_counts.drafted > 0
    assert engine.draft_counts.ahead == 0


@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_captures_do_not_run_ahead(models, draft_tokens):
    """Guards: logits that the next round has overwritten."""
    options = {"draft_tokens": draft_tokens, "top_tokens": 2, "batch_size": 4}
    engine = paged_engine(*models, ahead=True, **options)
    outcome(engine, requests_of(4))
    assert engine.draft_counts.ahead == 0


def test_a_text_alone_wastes_no_round_at_its_limit(models):
    """Guards: a round for a text that is known to end with the one before."""
    vocab = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    engine = paged_engine(*models, vocab=vocab, ahead=True, draft_tokens=0)
    outcome(engine, requests_of(1, new=(10,)))
    assert (engine.draft_counts.rounds, engine.draft_counts.ahead) == (10, 8)
    assert engine.notes()["ahead"].startswith("8 of 10 rounds")
