"""The engine over tables: the suite that every engine passes, drafts, long lists, failures."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from optimal_sampling.config import MixtureConfig, ServersOptions, ToyOptions
from optimal_sampling.engines.servers.engine import (
    LoopThread,
    ServersEngine,
    served_models,
    start_models,
)
from optimal_sampling.engines.servers.fake_server import FakeModel, FakeServer
from optimal_sampling.engines.servers.table_model import LogitsModel, TableModel
from optimal_sampling.engines.toy import ToyEngine
from optimal_sampling.errors import ConfigError, EngineError, ServerError
from optimal_sampling.types import LIST_FIELDS, Request
from tests.engines.conformance import EngineConformance, Harness

PROMPTS = [([1, 2], [3]), ([4], [5, 1, 2]), ([2, 2, 2], [2])]
NO_STOP = frozenset()


def tables_of(vocab=6, scale=1.0):
    tables = ToyEngine.random(MixtureConfig(), vocab).tables
    return {role: scale * table.double().numpy() for role, table in tables.items()}


def table_models(vocab=6, scale=1.0, seconds=0.0, **claims):
    claims = {"context_length": 64, **claims}
    return {
        role: TableModel(table, seconds=seconds, **claims)
        for role, table in tables_of(vocab, scale).items()
    }


def engine_over(models, mixture=None, vocab=6, stop_ids=frozenset({0}), **options):
    given = ServersOptions(**{"server_top_k": -1, "draft_tokens": 0, **options})
    engine = ServersEngine(models, MixtureConfig(), given, LoopThread(), vocab, stop_ids)
    return engine.view(mixture)


def requests(count=12, new=12, samples=1):
    return [
        Request(f"prompt {i}", j, 0, *map(tuple, PROMPTS[i % len(PROMPTS)]), new)
        for i in range(count)
        for j in range(samples)
    ]


def tokens_of(engine, asked):
    return {c.request.key: c.token_ids for c in engine.generate(asked)}


def harness_of(engine, tables):
    return Harness(
        open=lambda mixture, batch_size: engine.view(
            mixture, options=replace(engine.options, batch_size=batch_size)
        ),
        logits=lambda role, ids: tables[role][ids[-1]],
        prompts=PROMPTS,
        context_length=64,
        samples=900,
    )


class Suite(EngineConformance):
    draft_tokens = 0

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        tables = tables_of()
        engine = engine_over(table_models(), draft_tokens=cls.draft_tokens)
        yield harness_of(engine, tables)
        engine.close()


class TestLockstep(Suite):
    """One token per round."""


class TestDrafts(Suite):
    """Several tokens per round."""

    draft_tokens = 4


@pytest.mark.slow
class TestFakeServers(EngineConformance):
    """Over HTTP, with drafts."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        tables = tables_of()
        limits = {"max_logprobs": -1, "context_length": 64}
        with (
            FakeServer(FakeModel(tables["student"], **limits)) as student,
            FakeServer(FakeModel(tables["teacher"], **limits)) as teacher,
        ):
            options = ServersOptions(student_url=(student.url,), teacher_url=(teacher.url,))
            models, thread = served_models(options, "mixture", 6), LoopThread()
            thread.run(start_models(models))
            given = replace(options, server_top_k=-1, draft_tokens=2)
            engine = ServersEngine(models, MixtureConfig(), given, thread, 6, frozenset({0}))
            yield harness_of(engine, tables)
            engine.close()


del Suite


@pytest.mark.parametrize("drafts", [0, 3])
def test_draws_from_lists_follow_q_of_the_lists(drafts):
    """Guards: drafts that are drawn too often. The power check rejects the student's own draws."""
    tables = tables_of(12, 0.7)
    engine = engine_over(
        table_models(12, 0.7), vocab=12, stop_ids=NO_STOP, server_top_k=5, draft_tokens=drafts
    )
    asked = [Request("chi", j, 1, (3,), (4,), 1) for j in range(900)]
    done = list(engine.generate(asked))
    engine.close()
    first = Counter(c.token_ids[0] for c in done)
    log_q = {c.token_ids[0]: c.trace["log_q"][0] for c in done}
    assert sum(np.exp(list(log_q.values()))) == pytest.approx(1, abs=1e-5)
    assert stats.chisquare(*paired(first, log_q, 900)).pvalue > 1e-3
    student = dict(enumerate(np.log(softmax(tables["student"][3]))))
    assert stats.chisquare(*paired(first, {t: student[t] for t in log_q}, 900)).pvalue < 1e-6


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def paired(counts, log_p, total):
    """Observed and expected counts of all but rare tokens, scaled to one sum."""
    often = [token for token, value in log_p.items() if np.exp(value) * total >= 5]
    observed = np.array([counts[token] for token in often])
    wanted = np.exp([log_p[token] for token in often])
    return observed, wanted * observed.sum() / wanted.sum()


@pytest.mark.parametrize("mode", ["mixture", "student", "teacher"])
@pytest.mark.parametrize("tolerance", [None, 0.05])
def test_drafts_change_no_token(mode, tolerance):
    """Guards: a path that is taken further than the lists agree, a list of another position, a
    bound that differs with the way of asking."""
    found = []
    for drafts in (0, 1, 6, "auto"):
        engine = engine_over(
            table_models(40, 2.0),
            MixtureConfig(temperature=0.8),
            vocab=40,
            server_top_k=4,
            draft_tokens=drafts,
            tv_tolerance=tolerance,
        ).view(mode=mode)
        done = list(engine.generate(requests(6, new=25)))
        found.append({c.request.key: (c.token_ids, c.trace["tv_bound"]) for c in done})
        rounds, tokens = engine.rounds, sum(len(c.token_ids) for c in done)
        engine.close()
        assert rounds == tokens if drafts == 0 else rounds < tokens
        if drafts and mode == "mixture":
            assert engine.counts.accepted > 0.3 * engine.counts.drafted > 0
    assert found[0] == found[1] == found[2] == found[3]


def test_longer_lists_are_asked_for_until_the_bound_is_small():
    """Guards: a tolerance that is ignored, or asks for ever where a server has no more."""
    mixture, asked = MixtureConfig(), requests(4, new=10)
    models = table_models(200, 2.0)
    engine = engine_over(models, mixture, 200, NO_STOP, server_top_k=10, tv_tolerance=0.02)
    for c in engine.generate(asked):
        assert max(c.trace["tv_bound"]) <= 0.02
    assert engine.counts.asked_again > 0
    assert engine.counts.above == 0
    engine.close()
    limited = table_models(200, 2.0, max_top_k=12, can_choose_ids=False)
    engine = engine_over(limited, mixture, 200, NO_STOP, server_top_k=10, tv_tolerance=0.02)
    done = list(engine.generate(asked))
    assert max(max(c.trace["tv_bound"]) for c in done) > 0.02
    assert engine.counts.above > 0
    assert "stayed above" in engine.notes()["longer lists"]
    engine.close()


class Watched(TableModel):
    """A table that counts how many lists of one token are asked for at once."""

    now = most = 0

    async def next_tokens(self, prefix, top_k, extra_ids=()):
        """Counted."""
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            return await super().next_tokens(prefix, top_k, extra_ids)
        finally:
            self.now -= 1


def test_longer_lists_of_a_draft_are_asked_for_at_once():
    """Guards: a round trip for every token of a draft whose bound is too large."""
    table = np.where(np.eye(40, k=1) + np.eye(40, k=-39) > 0, 6.0, 0.0)
    models = {role: Watched(table, seconds=0.002) for role in ("student", "teacher")}
    engine = engine_over(
        models, None, 40, NO_STOP, server_top_k=3, draft_tokens=6, tv_tolerance=0.01
    )
    [done] = engine.generate([Request("a", 0, 0, (1,), (2, 1), 30)])
    assert engine.rounds < 15
    assert engine.counts.asked_again >= len(done.token_ids)
    assert min(model.most for model in models.values()) >= 5
    engine.close()


def test_the_trace_says_what_the_lists_cover():
    """Guards: a run whose error is not recorded."""
    engine = engine_over(table_models(40), vocab=40, server_top_k=10)
    traces = [c.trace for c in engine.generate(requests(3))]
    for trace in traces:
        assert set(LIST_FIELDS) <= set(trace.columns)
        assert all(0 < x <= 1 for name in LIST_FIELDS for x in trace[name])
    bounds = [x for trace in traces for x in trace["tv_bound"]]
    assert engine.counts.mean_bound == pytest.approx(np.mean(bounds))
    assert engine.counts.largest_bound == max(bounds)
    exact = engine.view(options=replace(engine.options, server_top_k=-1))
    for c in exact.generate(requests(2)):
        assert set(c.trace["tv_bound"]) == {0.0}
        assert set(c.trace["covered_teacher"]) == {1.0}
    engine.close()


def test_both_servers_are_asked_at_once():
    """Guards: a round that takes both times."""
    for drafts in (0, 2):
        models = table_models(seconds=0.05)
        engine = engine_over(models, stop_ids=NO_STOP, draft_tokens=drafts)
        started = time.perf_counter()
        list(engine.generate([Request("a", 0, 0, (1,), (2,), 12)]))
        seconds = time.perf_counter() - started
        student, teacher = (model.requests for model in models.values())
        assert teacher == engine.rounds
        assert student == engine.rounds if drafts == 0 else student < 2 * engine.rounds
        assert seconds < 1.5 * 0.05 * student
        engine.close()


@pytest.mark.parametrize(("stop_id", "length"), [(4, 4), (None, 12)])
def test_where_models_agree_a_text_is_one_draft_and_one_score(stop_id, length):
    """Guards: lists asked for twice, and drafts after the end of a text."""
    table = np.full((20, 20), -30.0)
    table[np.arange(20), (np.arange(20) + 1) % 20] = 0
    models = {role: TableModel(table, context_length=64) for role in ("student", "teacher")}
    stop_ids = NO_STOP if stop_id is None else frozenset({stop_id})
    engine = engine_over(models, vocab=20, stop_ids=stop_ids, draft_tokens=11, batch_size=1)
    asked = [Request("counts up", j, 0, (0,), (0,), 12) for j in range(8)]
    for c in engine.generate(asked):
        assert c.token_ids == tuple((i + 1) % 20 for i in range(length))
    before = {role: model.requests for role, model in models.items()}
    list(engine.generate(asked[:1]))
    assert {role: model.requests - before[role] for role, model in models.items()} == {
        "student": 1,
        "teacher": 1,
    }
    engine.close()


def test_a_request_that_a_server_does_not_answer_fails_alone():
    """Guards: one failure that ends the run, or a cause that is lost."""

    def logits(text):
        if text[-1] == 4:
            raise ServerError("server http://x: reset: gone (8 attempts)", "reset")
        return np.zeros(6)

    models = table_models()
    models["teacher"] = LogitsModel(logits, 6)
    asked = [Request(f"r{i}", 0, 0, (1,), (1,), 40) for i in range(30)]
    engine = engine_over(models, stop_ids=NO_STOP, batch_size=5)
    done = list(engine.generate(asked))
    failed = [c for c in done if c.finish_reason == "error"]
    assert len(done) == 30
    assert len(failed) == sum(4 in c.token_ids[:-1] or c.token_ids[-1] == 4 for c in done)
    assert len(failed) > 0
    for c in failed:
        assert c.token_ids[-1] == 4
        assert len(c.trace) == len(c.token_ids)
        assert "the teacher's server http://x: reset: gone" in c.error
    engine.close()


def test_closing_gives_up_what_is_in_flight():
    """Guards: rows that go on after Ctrl-C."""
    models = table_models(seconds=0.01)
    engine = engine_over(models, stop_ids=NO_STOP)
    stream = engine.generate(requests(8, new=50))
    first = next(engine.generate([Request("a", 0, 0, (1,), (1,), 1)]))
    assert first.finish_reason == "length"
    engine.thread.submit(_wait(0.05)).result()
    next(stream)
    stream.close()
    before = models["student"].requests
    engine.thread.submit(_wait(0.1)).result()
    assert models["student"].requests == before
    engine.close()
    assert models["teacher"].closed
    with pytest.raises(EngineError, match="closed"):
        next(engine.generate(requests(1)))
    engine.close()


async def _wait(seconds):
    import asyncio

    await asyncio.sleep(seconds)


def test_a_lost_model_is_named():
    """Guards: a run that ends because a server is gone, and does not say whose it was."""

    class Lost(TableModel):
        async def next_tokens(self, *given):
            raise EngineError("server http://a: refused")

    models = table_models()
    engine = engine_over(models | {"teacher": Lost(tables_of()["teacher"])})
    with pytest.raises(EngineError, match="the teacher's server http://a: refused"):
        list(engine.generate(requests(2)))
    engine.close()


def test_what_lists_cannot_give_is_refused():
    """Guards: a mixture or a mode that is drawn wrongly."""
    engine = engine_over(table_models(max_top_k=4), server_top_k=4)
    with pytest.raises(ConfigError, match="interleaved needs the student's mass"):
        engine.view(MixtureConfig(alpha_method="interleaved"))
    longer = replace(engine.options, server_top_k=6)  # all tokens, which the servers do not give
    with pytest.raises(ConfigError, match="interleaved needs the student's mass"):
        engine.view(MixtureConfig(alpha_method="interleaved"), options=longer)
    assert "of 4 tokens" in engine.view(options=longer).notes()["teacher_lists"]
    assert "teacher_lists" not in engine.notes()
    with pytest.raises(ConfigError, match="the student's server gives at most 4 of them"):
        engine.view(options=replace(engine.options, server_top_k=-1))
    with pytest.raises(ConfigError, match="options of the engine toy"):
        engine.view(options=ToyOptions())
    engine.close()
    models = {"teacher": table_models()["teacher"]}
    alone = ServersEngine(models, MixtureConfig(), ServersOptions(), LoopThread(), 6)
    with pytest.raises(ConfigError, match="no student was connected"):
        alone.view(MixtureConfig())
    assert [c.finish_reason for c in alone.view(mode="teacher").generate(requests(1))] == ["length"]
    alone.close()
