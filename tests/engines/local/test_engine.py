"""The local engine: the common suite; memory, chunks, shared weights, padded vocabularies."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch

from optimal_sampling.config import MixtureConfig
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Request
from tests.engines.conformance import EngineConformance, Harness, by_key, requests_of
from tests.engines.local.conftest import (
    CONTEXT,
    VOCAB,
    engine_of,
    stock_logits,
    tiny_model,
    vocabulary,
    with_options,
)

PROMPTS = [
    ([1, 2, 3], [4]),
    ([5], [6, 7, 8, 9, 1, 2, 3, 4, 5]),
    ([2] * 17, [3] * 21),
    ([7, 8], [7, 8]),
]


def harness_of(student, teacher):
    stock = {"student": stock_logits(student), "teacher": stock_logits(teacher)}
    base = engine_of(student, teacher)
    return Harness(
        open=lambda mixture, batch_size: base.view(
            mixture, options=replace(base.options, batch_size=batch_size)
        ),
        logits=lambda role, ids: stock[role](ids),
        prompts=PROMPTS,
        context_length=CONTEXT,
    )


class TestLocalEngine(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        return harness_of(tiny_model(1, layers=1), tiny_model(2, layers=3))


class TestSharedWeights(EngineConformance):
    """The same weights for both roles: loaded once, both contexts in one forward pass."""

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        model = tiny_model(2, layers=3)
        return harness_of(model, model)

    def test_draws_follow_q(self, harness):
        """As in the suite; the two prompts are what makes q differ from the teacher."""
        super().test_draws_follow_q(harness)


@pytest.fixture(scope="module")
def models():
    return tiny_model(1, layers=1), tiny_model(2, layers=3)


def same(a, b):
    """Tokens and diagnostics, bit for bit; a NaN, as alpha where there is none, is itself."""

    def bits(completions):
        return {
            k: (c.token_ids, {name: np.array(x).tobytes() for name, x in c.trace.columns.items()})
            for k, c in by_key(completions).items()
        }

    return bits(a) == bits(b)


def test_diagnostics_have_the_same_bits_in_every_batch(models):
    """Guards: resumed runs whose records differ in the last digits (shape rules)."""
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 24, new=20)
    engine = engine_of(*models)
    alone = list(with_options(engine, batch_size=1).generate(requests))
    for batch_size in (2, 5, 16, 24):
        assert same(alone, with_options(engine, batch_size=batch_size).generate(requests[::-1]))


def test_diagnostics_have_the_same_bits_beside_long_texts():
    """Guards: the class of key lengths of the CPU's attention chosen by the batch's longest row."""
    student, teacher = (tiny_model(s, layers=2, max_position_embeddings=2048) for s in (1, 2))
    engine = engine_of(student, teacher, vocab=vocabulary(context=2048))
    lengths = [3, 200, 370, 380, 390, 500, 700, 1100]
    requests = [
        Request(str(n), 0, 0, tuple([2, 3, 5] * n)[:n], (1, 4) * (n // 2) + (3,), 12)
        for n in lengths
    ]
    alone = list(with_options(engine, batch_size=1).generate(requests))
    assert same(alone, with_options(engine, batch_size=8).generate(requests))
    assert same(alone, with_options(engine, batch_size=3).generate(requests[::-1]))


def test_chunked_prompts_and_preemption_change_nothing(models):
    """Guards: a chunk at a wrong position; a preempted request not continued where it was."""
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 16, new=40)
    engine = engine_of(*models)
    expected = list(engine.generate(requests))
    chunked = engine_of(*models, prefill_chunk=3)
    assert same(expected, chunked.generate(requests))
    per_token = sum(r.bytes_per_token for r in engine.pair.runners.values())
    tight = engine_of(*models, kv_memory_gib=4.2 * 64 * per_token / 2**30, batch_size=16)
    assert same(expected, tight.generate(requests))
    assert tight.loop.scheduler.preemptions == 0, (
        "64 tokens are one allocation: nothing to preempt yet"
    )
    longer = requests_of(Harness(None, None, PROMPTS, CONTEXT), 16, new=75)
    stop_free = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    expected = list(engine_of(*models, vocab=stop_free).generate(longer))
    tight = engine_of(
        *models, vocab=stop_free, kv_memory_gib=4.2 * 64 * per_token / 2**30, batch_size=16
    )
    assert same(expected, tight.generate(longer))
    assert tight.loop.scheduler.preemptions > 0


def allocated(engine):
    """Bytes of all tensors of the caches."""
    memories = [m for model in engine.loop.models for m in model.cache.memories()]
    return sum(m.numel() * m.element_size() for m in memories)


def test_memory_stays_within_the_budget(models):
    """Guards: caches that outgrow what they were given."""
    stop_free = dataclasses.replace(vocabulary(), stop_ids=frozenset())
    engine = engine_of(*models, vocab=stop_free, kv_memory_gib=0.001, batch_size=4096)
    requests = requests_of(Harness(None, None, PROMPTS, CONTEXT), 300, new=70)
    sizes = [allocated(engine) for _ in engine.generate(requests)]
    assert len(sizes) == 300
    assert 0.0005 * 2**30 < max(sizes) <= 0.001 * 2**30


def test_a_request_beyond_the_budget_fails_alone(models):
    """Guards: an out-of-memory that ends the run."""
    per_token = sum(r.bytes_per_token for r in engine_of(*models).pair.runners.values())
    engine = engine_of(*models, kv_memory_gib=100 * per_token / 2**30, batch_size=4)
    small, large = Request("s", 0, 0, (1, 2), (3,), 4), Request("l", 0, 0, (2,) * 80, (3,) * 80, 10)
    done = by_key(engine.generate([large, small]))
    assert "KV cache" in done["l", 0].error
    assert done["s", 0].error == ""


def test_surplus_rows_of_a_padded_vocabulary_are_never_drawn():
    """Guards: 151,936 against 152,064 rows of logits over the same ids."""
    student, teacher = tiny_model(1, vocab=VOCAB), tiny_model(2, vocab=VOCAB + 8)
    teacher.lm_head.weight.data[VOCAB:] = 9.0  # the surplus rows would win every draw
    engine = engine_of(student, teacher)
    for completion in engine.generate(requests_of(Harness(None, None, PROMPTS, CONTEXT), 10)):
        assert max(completion.token_ids) < VOCAB
        assert completion.error == ""


@pytest.mark.parametrize("draft_tokens", [0, 1, 4, "auto"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_nan_logits_fail_their_request_only(models, draft_tokens, batch_size):
    """Guards: NaN that a request, or a rejected draft, leaves in a row's cache for others."""
    broken = tiny_model(2, layers=3)
    broken.model.embed_tokens.weight.data[11] = float("nan")
    good = [
        request
        for seed in (0, 3)
        for request in requests_of(Harness(None, None, PROMPTS, CONTEXT), 6, new=8, seed=seed)
    ]
    bad = [Request("bad", i, 0, (1, 2), (1, 11, 2), 8) for i in range(2)]
    expected = list(engine_of(*models, batch_size=1).generate(good))
    engine = engine_of(
        tiny_model(1, layers=1), broken, batch_size=batch_size, draft_tokens=draft_tokens
    )
    requests = [bad[0], *good[:6], bad[1], *good[6:]]
    done = {c.request: c for c in engine.generate(requests)}
    assert len(done) == len(requests)
    for request in bad:
        assert done[request].finish_reason == "error"
        assert "teacher" in done[request].error
        assert "student" not in done[request].error
    clean = [c for c in expected if 11 not in c.token_ids[:-1]]
    assert 0 < len(clean) < len(expected)
    for c in clean:
        assert (done[c.request].error, done[c.request].token_ids) == ("", c.token_ids)
    for c in expected:
        if c not in clean:
            before = c.token_ids[: c.token_ids.index(11) + 1]
            assert done[c.request].token_ids == before
            assert "NaN" in done[c.request].error


def test_captured_rows_are_the_models_own(models):
    """Guards: logits of another row, position or temperature in what a user analyses."""
    engine = engine_of(*models, batch_size=4).view(
        MixtureConfig(temperature=0.5, top_k=3),
        capture=frozenset({"student_logits", "teacher_logits", "log_q"}),
    )
    stock = [stock_logits(m) for m in models]
    for c in engine.generate(requests_of(Harness(None, None, PROMPTS, CONTEXT), 5, new=6)):
        prompts = (c.request.student_prompt_ids, c.request.teacher_prompt_ids)
        for name, prompt, logits in zip(
            ("student_logits", "teacher_logits"), prompts, stock, strict=True
        ):
            assert c.captured[name].shape == (len(c.token_ids), VOCAB)
            for i in range(len(c.token_ids)):
                expected = torch.from_numpy(logits([*prompt, *c.token_ids[:i]])).float()
                torch.testing.assert_close(c.captured[name][i], expected, atol=1e-4, rtol=1e-4)
        assert ((c.captured["log_q"] > -float("inf")).sum(-1) <= 3).all()
        torch.testing.assert_close(c.captured["log_q"].exp().sum(-1), torch.ones(len(c.token_ids)))
    with pytest.raises(ConfigError, match="cannot capture"):
        engine.view(capture=frozenset({"nonsense"}))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_one_model_alone_draws_from_that_model(models, role):
    """Guards: a baseline that is not the model it is named after."""
    engine = engine_of(*models).view(mode=role)
    logits = stock_logits(models[role == "teacher"])
    for c in engine.generate(requests_of(Harness(None, None, PROMPTS, CONTEXT), 5, new=6)):
        prompt = c.request.student_prompt_ids if role == "student" else c.request.teacher_prompt_ids
        for i, token in enumerate(c.token_ids):
            row = torch.from_numpy(logits([*prompt, *c.token_ids[:i]])).log_softmax(-1)
            assert c.trace[f"log_p_{role}"][i] == pytest.approx(row[token].item(), abs=1e-4)


def test_a_batch_of_4096_runs(models):
    """Guards: a large batch size that fails instead of running in parts."""
    engine = engine_of(*models, batch_size=4096, kv_memory_gib=0.02)
    assert (
        sum(
            1
            for _ in engine.generate(requests_of(Harness(None, None, PROMPTS, CONTEXT), 600, new=3))
        )
        == 600
    )
