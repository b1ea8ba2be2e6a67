"""Drafting policy on given costs, lookup in given texts; drafts change nothing but time."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimal_sampling.config import LocalOptions, MixtureConfig
from optimal_sampling.engines.device import Overlap
from optimal_sampling.engines.local import round_noise
from optimal_sampling.engines.local.drafting import (
    DraftPolicy,
    ExpectedTokens,
    FixedDrafts,
    LinearCost,
    Lookup,
    PerRound,
)
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.engines.local.round import Sampler
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Request
from tests.engines.conformance import Harness, requests_of
from tests.engines.local.conftest import (
    CONTEXT,
    VOCAB,
    engine_of,
    tiny_model,
    vocabulary,
    with_options,
)
from tests.engines.local.test_engine import PROMPTS, same


def simulate(
    acceptance, step, verify, rows=1, rounds=400, sure=None, seed=0, plain=None, policy=None
):
    """Rounds with true costs (functions of size, in ms): (policy, tokens per ms, widths).

    `plain`: ms of a plain round, where that is another kind; its width is then given as 0.
    """
    rng, policy = random.Random(seed), policy or DraftPolicy()
    tokens = time = 0.0
    widths = []
    for _ in range(rounds):
        if plain is not None and policy.plain_next(rows):
            policy.observe_plain(rows, plain(rows))
            tokens, time = tokens + rows, time + plain(rows)
            widths.append(0)
            continue
        round_, forced = PerRound(policy, [True] * rows), policy.forced()
        alive, width = np.ones(rows, dtype=bool), 1
        confidences, accepted, tried = [], [], []
        while width <= policy.most and width != forced:
            confidence = np.array([(sure or (lambda r: 0.95))(rng) for _ in range(rows)])
            if not round_.wants(confidence, insist=forced is not None):
                break
            rates = [acceptance(c) if callable(acceptance) else acceptance for c in confidence]
            taken = np.array([rng.random() < rate for rate in rates])
            confidences.append(confidence)
            accepted.append(taken)
            tried.append(alive)
            alive = alive & taken
            width += 1
        made = rows
        if width > 1:
            columns = [np.stack(each, 1) for each in (confidences, accepted, tried)]
            policy.observe_drafts(*columns)
            made += int((columns[1] & columns[2]).sum())
        drafting, last = (width - 1) * step(rows), step(rows) + verify(width * rows)
        spent = drafting + last
        policy.observe_round(width, rows, drafting, last, 0.0)
        tokens, time = tokens + made, time + spent
        widths.append(width)
    return policy, tokens / time, widths[50:]


def best_fixed(acceptance, step, verify, rows=1):
    def rate(k):
        tokens = sum(acceptance**i for i in range(k + 1)) * rows
        return tokens / ((k + 1) * step(rows) + verify((k + 1) * rows))

    return max(rate(k) for k in range(17))


@pytest.mark.parametrize("acceptance", [0.98, 0.9, 0.7, 0.3])
@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize(
    ("step", "verify"),
    [
        (lambda r: 1 + 0.02 * r, lambda m: 8 + 0.1 * m),  # bound by calls: verifying is nearly free
        (
            lambda r: 1 + 0.1 * r,
            lambda m: 2 + 1.0 * m,
        ),  # bound by arithmetic: every verified token costs
        (lambda r: 4 + 0.1 * r, lambda m: 8 + 0.1 * m),  # a student that is hardly cheaper
    ],
)
def test_auto_is_near_the_best_fixed_length(acceptance, step, verify, rows):
    """Guards: a policy that drafts where it loses, or stops short where drafting is free."""
    _, rate, _ = simulate(acceptance, step, verify, rows)
    assert rate >= 0.93 * best_fixed(acceptance, step, verify, rows)


def test_auto_reaches_the_longest_draft_and_falls_to_lockstep():
    """Guards: a ceiling below 16, and drafting for a student that is always rejected."""
    free = simulate(0.995, lambda r: 0.1, lambda m: 10.0)[2]
    assert sorted(free)[len(free) // 2] == 17
    useless = simulate(0.05, lambda r: 2.0, lambda m: 4 + m)[2]
    assert sum(w > 1 for w in useless) <= 0.05 * len(useless)


H100_STEP, H100_VERIFY, H100_PLAIN = (lambda r: 2.26), (lambda m: 6.2 + 0.0037 * m), 4.74
"""Milliseconds of Qwen2.5-3B and 1.5B at 32 rows, docs/performance.md: the host's are in verify."""


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize(
    ("acceptance", "drafts"),
    [(0.3, False), (0.6, False), (0.75, False), (0.93, True), (0.98, True)],
)
def test_auto_takes_lockstep_where_both_models_overlap(acceptance, drafts, rows):
    """Guards: drafts compared with both models one after the other, where a plain round is less."""
    arguments = (acceptance, H100_STEP, H100_VERIFY, rows)
    _, rate, widths = simulate(*arguments, rounds=1500, plain=lambda r: H100_PLAIN)
    best = max(rows / H100_PLAIN, best_fixed(*arguments))
    assert (best > rows / H100_PLAIN) == drafts
    assert rate >= 0.93 * best
    share = sum(width > 1 for width in widths) / len(widths)
    assert share > 0.6 if drafts else share < 0.1
    assert 1 not in widths, "a plain round is never run as one with drafts"


def test_auto_goes_over_when_costs_or_acceptance_change():
    """Guards: a choice that is made once: other rows, a busy host or other texts change it."""
    policy = DraftPolicy()

    def drafted(acceptance, plain):
        arguments = (acceptance, H100_STEP, H100_VERIFY, 32)
        _, _, widths = simulate(*arguments, rounds=1000, plain=lambda r: plain, policy=policy)
        return sum(width > 1 for width in widths[500:]) / len(widths[500:])

    assert drafted(0.5, H100_PLAIN) < 0.05
    assert drafted(0.97, H100_PLAIN) > 0.9
    assert drafted(0.97, 2.0) < 0.05, "plain rounds have become faster"
    assert drafted(0.97, 9.0) > 0.9, "and slower"
    assert drafted(0.5, H100_PLAIN) < 0.05


def test_auto_without_room_for_drafts_asks_seldom():
    """Guards: a full memory in which no round is queued ahead, as drafts are to be tried first."""
    policy, plain = DraftPolicy(), 0
    for _ in range(100):
        if policy.plain_next(8):
            plain += 1
        else:
            policy.no_room()
    assert plain == 80


def test_fixed_lengths_are_plain_always_or_never():
    """Guards: a length that was asked for, left for one that is thought to be faster."""
    for count in (0, 3):
        policy = FixedDrafts(count)
        for _ in range(300):
            policy.observe_plain(4, 1.0 if count else 100.0)
            policy.observe_round(count + 1, 4, 5.0, 5.0, 5.0)
        assert policy.plain_next(4) == (count == 0)


def test_looked_up_drafts_count_rows_that_have_none():
    """Guards: tokens expected of every row, where half of them have nothing to look up."""
    expected = ExpectedTokens()
    has = np.array([[True] * 4, [False] * 4])
    for _ in range(300):
        tried = np.array([[True] * 4, [True, False, False, False]])
        expected.observe(has, tried)
    assert expected.by_width(5) == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0], abs=0.01)


def test_auto_stops_when_the_student_is_unsure():
    """Guards: drafting on through a token that will be rejected; confidences that gain nothing."""
    step, verify = (lambda r: 1.0), (lambda m: 8 + 0.1 * m)
    mixed = lambda rng: 0.98 if rng.random() < 0.85 else 0.2  # noqa: E731
    acceptance = lambda c: 0.99 if c > 0.5 else 0.15  # noqa: E731
    seeing = simulate(acceptance, step, verify, sure=mixed)[1]
    blind = simulate(0.85 * 0.99 + 0.15 * 0.15, step, verify)[1]
    assert seeing > 1.1 * blind


def test_costs_are_a_line_and_follow_the_machine():
    """Guards: a fit that goes negative, or never forgets that the machine was idle once."""
    cost = LinearCost()
    assert cost(5) == 0.0
    cost.observe(4, 2.0)
    assert cost(8) == 2.0
    for size in (1, 2, 4, 8) * 5:
        cost.observe(size, 3.0 + 0.5 * size)
    assert cost(16) == pytest.approx(11.0, rel=0.1)
    for size in (1, 2, 4, 8) * 60:
        cost.observe(size, 6.0 + 1.0 * size)
    assert cost(16) == pytest.approx(22.0, rel=0.05)
    for size in (8, 1) * 60:
        cost.observe(size, 1.0 if size == 8 else 5.0)
    assert cost(20) == pytest.approx(3.0, rel=0.3), "seconds that fall with the size: their mean"
    assert cost(20) == pytest.approx(cost(1), rel=1e-6)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.integers(0, 3), max_size=30),
    st.integers(1, 8),
)
def test_lookup_proposes_what_followed(prompt, output, count):
    """Guards: a continuation of another place, ids not in the text, the end as its own match."""
    lookup = Lookup([prompt[:1], prompt] if len(prompt) > 1 else [prompt])
    for end in range(len(output) + 1):  # the index grows with the text
        proposed = lookup.propose(output[:end], count)
    text = prompt + output
    assert len(proposed) <= count
    if proposed:
        places = [
            i
            for size in (2, 3, 4)
            for i in range(size, len(text))
            if text[i - size : i] == text[-size:] and text[i : i + len(proposed)] == proposed
        ]
        assert places
    elif len(text) > 2 and output:
        assert text[-2:] not in [text[i - 2 : i] for i in range(2, len(text))]


def test_lookup_continues_a_solution():
    """Guards: self-distillation without its drafts: the teacher's prompt holds the text to come."""
    solution = list(range(10, 40))
    lookup = Lookup([[1, 2, 3], [1, 2, 3, *solution, 4]])
    assert lookup.propose([10, 11, 12], 5) == [13, 14, 15, 16, 17]
    assert lookup.propose([10, 11, 12, 99, 98], 5) == []
    assert lookup.propose([10, 11, 12, 99, 98, 20, 21], 3) == [22, 23, 24]


@pytest.fixture(scope="module")
def models():
    student, teacher = tiny_model(1, layers=1), tiny_model(2, layers=3)
    # a teacher like its student, so that drafts are accepted and rejected
    teacher.model.embed_tokens.weight.data.copy_(student.model.embed_tokens.weight.data)
    teacher.lm_head.weight.data.mul_(0.3).add_(student.lm_head.weight.data)
    return student, teacher


MIXTURES = {
    "default": MixtureConfig(),
    "free": MixtureConfig(alpha_min=0.0, temperature=0.7),
    "forced first": MixtureConfig(force_first_token=True, alpha_method="reverse_kl_symmetry"),
    "truncated": MixtureConfig(top_k=5, top_p=0.9, alpha_method="entropy", alpha_min=0.0),
    "support": MixtureConfig(teacher_support_top_k=4, alpha_method="ess_balance"),
    "schedule": MixtureConfig(alpha_method="schedule", schedule_tokens=6, alpha_min=0.0),
    "veto": MixtureConfig(alpha_method="veto", temperature=0.7),
    "likeliest of veto": MixtureConfig(alpha_method="veto", top_k=1),
    "interleaved": MixtureConfig(alpha_method="interleaved", interleaved_min_p=0.3),
    "arithmetic": MixtureConfig(alpha_method="arithmetic", top_k=8, teacher_support_min_p=0.01),
}


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
def test_speculative_is_lockstep_bit_for_bit(models, mixture):
    """Guards: the losslessness of speculation: tokens and diagnostics, for every draft length."""
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 24, new=30)
    engine = engine_of(*models, mixture=mixture, batch_size=8)
    lockstep = list(with_options(engine, draft_tokens=0).generate(requests))
    for drafts in (1, 2, 5, 16, "auto"):
        drafting = with_options(engine, draft_tokens=drafts)
        assert same(lockstep, drafting.generate(requests))
        assert 0 < drafting.draft_counts.accepted < drafting.draft_counts.drafted
        assert f"of {drafting.draft_counts.drafted} drafted" in drafting.notes()["drafts"]


def test_shared_weights_with_lookup_are_lockstep_bit_for_bit(models):
    """Guards: the second drafter, and two contexts of many tokens in one forward pass."""
    prompts = [
        ([1, 2], [1, 2, 5, 6, 7, 5, 6, 7, 5, 6, 7]),
        ([3, 3, 3, 3], [3, 3, 3, 3]),
        ([4], [9, 8, 9, 8, 9, 8]),
    ]
    requests = requests_of(Harness(None, None, prompts, CONTEXT), 24, new=40)
    engine = engine_of(models[1], models[1], batch_size=8, mixture=MixtureConfig(temperature=0.3))
    lockstep = list(with_options(engine, draft_tokens=0).generate(requests))
    for drafts in (1, 3, 8, "auto"):
        drafting = with_options(engine, draft_tokens=drafts)
        assert same(lockstep, drafting.generate(requests))
        assert drafting.draft_counts.accepted > 0


def test_drafts_beside_long_prompts_chunks_and_preemption(models):
    """Guards: a round that straddles the key boundary, drafts of a row not yet cached."""
    student, teacher = (tiny_model(s, layers=2, max_position_embeddings=2048) for s in (1, 2))
    engine = engine_of(
        student, teacher, vocab=vocabulary(context=2048), prefill_chunk=100, batch_size=4
    )
    prompts = [([2, 3] * n, [1, 4, 5] * (n // 2 + 1)) for n in (3, 95, 185, 189, 230, 500)]
    requests = requests_of(Harness(None, None, prompts, 2048), 6, new=40)
    lockstep = list(with_options(engine, draft_tokens=0, batch_size=1).generate(requests))
    assert same(lockstep, with_options(engine, draft_tokens=7).generate(requests))


@pytest.mark.parametrize("value", [-1, "many", 1.5])
def test_a_draft_length_that_is_none_is_refused(value):
    """Guards: a traceback from deep within a run."""
    with pytest.raises(ConfigError, match="draft_tokens"):
        LocalOptions(draft_tokens=value)


def test_fixed_drafts_do_not_vary():
    """Guards: a length that was asked for and is not used."""
    assert FixedDrafts(4).forced() == 5
    assert FixedDrafts(0).forced() == 1


def test_drafts_do_not_decide_who_fits_into_memory(models):
    """Guards: requests that fail with drafts, for room that only drafts would take."""
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 8, new=60)
    per_token = sum(r.bytes_per_token for r in engine_of(*models).pair.runners.values())
    endless = vocabulary(stop_ids=frozenset())
    engine = engine_of(*models, kv_memory_gib=65 * per_token / 2**30, batch_size=4, vocab=endless)
    plain = list(with_options(engine, draft_tokens=0).generate(requests))
    assert any(c.error for c in plain)
    assert any(not c.error for c in plain)
    for drafts in (3, 16, "auto"):
        drafted = list(with_options(engine, draft_tokens=drafts).generate(requests))
        assert same(plain, drafted)
        assert {c.request.id: c.error for c in plain} == {c.request.id: c.error for c in drafted}


@pytest.mark.parametrize("draft_tokens", [0, 1, 4, "auto"])
def test_side_by_side_draws_the_same(draft_tokens):
    """Guards: the branch that a GPU takes, with both models' last passes queued at once."""
    engine = engine_of(tiny_model(1, layers=1), tiny_model(2, layers=3), draft_tokens=draft_tokens)
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 12, new=30)
    expected = list(engine.generate(requests))
    joined = []

    class Beside(Overlap):
        works = True

        def __init__(self):
            self._stream = None

        def join(self):
            joined.append(1)

    class Overlapping(LocalEngine):
        def _new_loop(self):
            loop = super()._new_loop()
            loop.sampler.overlap = Beside()
            loop.sampler.measures_confidence = False
            return loop

    beside = Overlapping(engine.pair, engine.mixture, engine.options, engine.vocabulary)
    assert same(expected, beside.generate(requests))
    assert len(joined) == beside.draft_counts.rounds


@pytest.mark.parametrize("mode", ["mixture", "teacher"])
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_noise_from_keys_is_the_same_noise(mode, draft_tokens, monkeypatch):
    """Guards: keys and positions in another order, which a GPU gets in place of the noise."""
    engine = engine_of(tiny_model(1, layers=1), tiny_model(2, layers=3), draft_tokens=draft_tokens)
    engine = engine.view(mode=mode)
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 12, new=30)
    expected = {c.request.id: c.token_ids for c in engine.generate(requests)}
    monkeypatch.setattr(round_noise, "runs_fused", lambda device: True)
    assert {c.request.id: c.token_ids for c in engine.generate(requests)} == expected


def test_looked_up_ids_outside_the_vocabulary_are_not_drafted():
    """Guards: a draft that cannot be accepted, or that another model has no embedding for."""
    model = tiny_model(2, layers=2, vocab=VOCAB + 4)
    engine = engine_of(model, model, draft_tokens=4)
    prompt = (3, 5, VOCAB + 1, 7) * 6 + (3,)
    seen = []

    class WatchedSampler(Sampler):
        def sample(self, plan, rows, before=None):
            sampled = super().sample(plan, rows, before)
            seen.append(sampled.drafts)
            return sampled

    class Watching(LocalEngine):
        def _new_loop(self):
            loop = super()._new_loop()
            loop.sampler = WatchedSampler(loop.models, loop.settings, loop.policy)
            return loop

    watching = Watching(engine.pair, engine.mixture, engine.options, engine.vocabulary)
    requests = [Request(str(i), 0, 0, (1, 2), prompt, 12) for i in range(6)]
    plain = with_options(engine, draft_tokens=0).generate(requests)
    assert same(plain, watching.generate(requests))
    assert max(int(d.max()) for d in seen if d.numel()) < VOCAB
