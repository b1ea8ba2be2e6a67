"""The suite that every engine passes. Subclass `EngineConformance` in a file pytest collects and
give it a harness."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from optimal_sampling.config import LocalOptions, MixtureConfig, ToyOptions
from optimal_sampling.distribution import naive
from optimal_sampling.distribution.naive import prepare
from optimal_sampling.engines.base import Engine
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import ALPHA_METHODS, TRACE_FIELDS, UNBOUNDED_METHODS, Request


@dataclass
class Harness:
    """An engine under test, and the two models behind it written out."""

    open: Callable[..., Engine]
    """(mixture, batch_size) -> engine."""
    logits: Callable[[str, list[int]], np.ndarray]
    """(role, token ids) -> logits of the next token over the shared vocabulary."""
    prompts: list[tuple[list[int], list[int]]]
    """(student's, teacher's) prompt ids, of different lengths and contents."""
    context_length: int
    samples: int = 3000
    """Of the chi-square."""


def log_softmax(x):
    x = np.asarray(x, dtype=np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def exact_q(student_logits, teacher_logits, mixture, position):
    """(q, alpha) of kl_symmetry with bounds, by bisection in float64; independent of the package's
    own reference."""
    s, t = (log_softmax(x / mixture.temperature) for x in (student_logits, teacher_logits))

    def q_at(alpha):
        return np.exp(log_softmax((1 - alpha) * s + alpha * t))

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (q_at(middle) * (t - s)).sum() < 0 else (low, middle)
    alpha = min(max(low, mixture.alpha_min), mixture.alpha_max)
    if mixture.force_first_token and position == 0:
        alpha = 1.0
    return q_at(alpha), alpha


def exact_veto(student_logits, teacher_logits, mixture):
    """q of `veto`: the student within what is at least a share of the teacher's largest."""
    p = np.exp(log_softmax(teacher_logits / mixture.temperature))
    q = np.exp(log_softmax(student_logits / mixture.temperature))
    q[p < mixture.veto_min_p * p.max()] = 0
    return q / q.sum()


def requests_of(harness, count=12, new=12, seed=0, samples=1):
    return [
        Request(f"prompt {i}", j, seed, *map(tuple, harness.prompts[i % len(harness.prompts)]), new)
        for i in range(count)
        for j in range(samples)
    ]


def by_key(completions):
    return {(c.request.id, c.request.sample_index): c for c in completions}


class EngineConformance:
    """Give a fixture `harness`."""

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_every_request_is_answered_once(self, harness, batch_size):
        """Guards: a row lost or served twice when slots are reused."""
        requests = requests_of(harness, 20)
        engine = harness.open(MixtureConfig(), batch_size)
        completions = list(engine.generate(iter(requests)))
        assert sorted(c.request.id for c in completions) == sorted(r.id for r in requests)
        for c in completions:
            assert c.finish_reason in ("stop", "length")
            assert 1 <= len(c.token_ids) <= 12
            assert len(c.trace) == len(c.token_ids)
            assert set(c.trace.columns) >= set(TRACE_FIELDS)
            assert (c.token_ids[-1] in engine.stop_ids) == (c.finish_reason == "stop")
            assert not engine.stop_ids & set(c.token_ids[:-1])

    def test_tokens_do_not_depend_on_the_batch(self, harness):
        """Guards: a slot that keeps the state of its last request, a prompt used for the whole
        batch."""
        requests = requests_of(harness, 20)
        alone = by_key(c for r in requests for c in harness.open(MixtureConfig(), 1).generate([r]))
        for batch_size, order in ((1, 1), (3, -1), (64, 1), (7, -1)):
            together = by_key(harness.open(MixtureConfig(), batch_size).generate(requests[::order]))
            assert {k: c.token_ids for k, c in together.items()} == {
                k: c.token_ids for k, c in alone.items()
            }

    def test_each_model_sees_its_own_prompt(self, harness):
        """Guards: the first request's student prompt, or the teacher's, used for all."""
        mixture = MixtureConfig(alpha_min=0.0)
        for completion in harness.open(mixture, 8).generate(requests_of(harness, 6, new=6)):
            contexts = {
                "student": completion.request.student_prompt_ids,
                "teacher": completion.request.teacher_prompt_ids,
            }
            for i, token in enumerate(completion.token_ids):
                for role, prompt in contexts.items():
                    expected = log_softmax(
                        harness.logits(role, [*prompt, *completion.token_ids[:i]])
                    )[token]
                    assert completion.trace[f"log_p_{role}"][i] == pytest.approx(expected, abs=2e-4)

    def test_alpha_and_divergences_are_those_of_the_enumeration(self, harness):
        """Guards: diagnostics of another position, row or temperature."""
        mixture = MixtureConfig(
            alpha_min=0.2, alpha_max=0.9, temperature=0.7, force_first_token=True
        )
        for completion in harness.open(mixture, 4).generate(requests_of(harness, 4, new=5)):
            text = []
            for i, token in enumerate(completion.token_ids):
                r = completion.request
                s = harness.logits("student", [*r.student_prompt_ids, *text])
                t = harness.logits("teacher", [*r.teacher_prompt_ids, *text])
                q, alpha = exact_q(s, t, mixture, i)
                kl = (q * (np.log(q) - log_softmax(s / 0.7))).sum()
                assert completion.trace["alpha"][i] == pytest.approx(alpha, abs=2e-3)
                assert completion.trace["kl_student"][i] == pytest.approx(kl, abs=2e-3)
                assert completion.trace["log_q"][i] == pytest.approx(np.log(q[token]), abs=2e-3)
                text.append(token)

    def test_a_view_has_its_own_mixture(self, harness):
        """Guards: a view that changes the engine it was made of, or draws as that engine does."""
        engine = harness.open(MixtureConfig(), 4)
        view = engine.view(MixtureConfig(alpha_min=0.9))
        requests = requests_of(harness, 4, new=3)
        assert (engine.mixture.alpha_min, view.mixture.alpha_min) == (0.5, 0.9)
        assert (view.mode, view.options) == (engine.mode, engine.options)
        alphas = [a for c in view.generate(requests) for a in c.trace["alpha"]]
        assert min(alphas) >= 0.9 - 1e-6
        alphas = [a for c in engine.generate(requests) for a in c.trace["alpha"]]
        assert min(alphas) < 0.9

    def test_one_model_alone(self, harness):
        """Guards: a mode that draws from the other model, or from the mixture."""
        engine = harness.open(MixtureConfig(temperature=0.7), 4)
        for role in {"student", "teacher"} & engine.modes:
            view = engine.view(mode=role)
            assert (view.mode, engine.mode) == (role, "mixture")
            for c in view.generate(requests_of(harness, 4, new=4)):
                prompt = c.request.prompt_ids(role)
                for i, token in enumerate(c.token_ids):
                    logits = harness.logits(role, [*prompt, *c.token_ids[:i]])
                    expected = log_softmax(logits / 0.7)[token]
                    assert c.trace["log_q"][i] == pytest.approx(expected, abs=2e-4)

    def test_settings_that_an_engine_does_not_have_are_refused(self, harness):
        """Guards: a mode, a capture or an option that is ignored."""
        engine = harness.open(MixtureConfig(), 4)
        with pytest.raises(ConfigError, match="no mode 'both'"):
            engine.view(mode="both")
        with pytest.raises(ConfigError, match="cannot capture nonsense"):
            engine.view(capture=frozenset({"nonsense"}))
        [other] = {LocalOptions, ToyOptions} - {type(engine.options), LocalOptions} or {
            LocalOptions
        }
        with pytest.raises(ConfigError, match=f"options of the engine {other.name} given to"):
            engine.view(options=other())
        for name in engine.options.fixed:
            changed = copy.copy(engine.options)
            object.__setattr__(changed, name, "another value")
            with pytest.raises(ConfigError, match=f"{name} was .* when the models were loaded"):
                engine.view(options=changed)

    def test_draws_follow_q(self, harness):
        """Guards: a wrong distribution. The power check: the same test rejects the teacher
        alone."""
        mixture = MixtureConfig()
        p_q, p_teacher = self.chi_square(harness, mixture)
        assert p_q > 1e-3
        assert p_teacher < 1e-6

    def test_draws_of_the_veto_follow_q(self, harness):
        """Guards: a support that is cut after the draw, or in the trace alone."""
        mixture = MixtureConfig(alpha_method="veto", veto_min_p=0.2)
        p_q, p_teacher = self.chi_square(harness, mixture)
        assert p_q > 1e-3
        assert p_teacher < 1e-6

    def chi_square(self, harness, mixture):
        """p-values of the first two tokens of many samples, against q* and against the teacher
        alone."""
        student, teacher = harness.prompts[0]
        samples = harness.samples
        requests = [Request("chi", j, 1, tuple(student), tuple(teacher), 2) for j in range(samples)]
        engine = harness.open(mixture, 256)
        seen = {}
        for c in engine.generate(requests):
            seen[c.token_ids] = seen.get(c.token_ids, 0) + 1
        p_values = []
        for only_teacher in (False, True):
            expected = self.enumerate(harness, mixture, engine.stop_ids, only_teacher)
            keys = sorted(expected, key=expected.get)
            assert all(expected[key] > 0 for key in seen)
            observed, wanted, rest = [], [], [0.0, 0.0]
            for key in keys:  # outcomes expected less than 5 times are counted together
                rest = [rest[0] + seen.get(key, 0), rest[1] + expected[key] * samples]
                if rest[1] >= 5:
                    observed.append(rest[0])
                    wanted.append(rest[1])
                    rest = [0.0, 0.0]
            observed[-1] += rest[0]
            wanted[-1] += rest[1]
            p_values.append(
                stats.chisquare(observed, np.array(wanted) * sum(observed) / sum(wanted)).pvalue
            )
        return p_values

    def enumerate(self, harness, mixture, stop_ids, only_teacher):
        """Probability of every completion of at most two tokens."""
        student, teacher = harness.prompts[0]

        def q_after(text):
            s, t = (
                harness.logits("student", [*student, *text]),
                harness.logits("teacher", [*teacher, *text]),
            )
            if only_teacher:
                return np.exp(log_softmax(t / mixture.temperature))
            if mixture.alpha_method == "veto":
                return exact_veto(s, t, mixture)
            return exact_q(s, t, mixture, len(text))[0]

        result = {}
        for first, p in enumerate(q_after([])):
            if first in stop_ids:
                result[(first,)] = p
                continue
            for second, p2 in enumerate(q_after([first])):
                result[(first, second)] = p * p2
        return result

    def test_samples_and_seeds_differ(self, harness):
        """Guards: noise that ignores the sample index or the seed."""
        engine = harness.open(MixtureConfig(), 64)
        first = by_key(engine.generate(requests_of(harness, 4, samples=8)))
        again = by_key(engine.generate(requests_of(harness, 4, samples=8)))
        other = by_key(engine.generate(requests_of(harness, 4, samples=8, seed=1)))
        assert {k: c.token_ids for k, c in first.items()} == {
            k: c.token_ids for k, c in again.items()
        }
        assert sum(first[k].token_ids != other[k].token_ids for k in first) > 16
        assert len({first["prompt 0", j].token_ids for j in range(8)}) > 3

    def test_bad_requests_fail_alone(self, harness):
        """Guards: a prompt that is cut silently, and one bad request that ends the run."""
        good = requests_of(harness, 3)
        long = Request("long", 0, 0, tuple([1] * harness.context_length), (1, 2), 5)
        alien = Request("alien", 0, 0, (1, 2), (1, 10**6), 5)
        empty = Request("empty", 0, 0, (), (1, 2), 5)
        done = by_key(
            harness.open(MixtureConfig(), 2).generate(
                [long, good[0], alien, good[1], empty, good[2]]
            )
        )
        assert len(done) == 6
        assert str(harness.context_length) in done["long", 0].error
        assert "student" in done["long", 0].error
        assert "teacher" in done["alien", 0].error
        assert "no tokens" in done["empty", 0].error
        for name in ("long", "alien", "empty"):
            assert done[name, 0].finish_reason == "error"
            assert done[name, 0].token_ids == ()
        assert all(done[r.id, 0].finish_reason != "error" for r in good)

    def test_requests_are_pulled_as_there_is_room_and_closing_gives_up(self, harness):
        """Guards: an endless stream read into memory, and an engine that cannot be used after
        Ctrl-C."""
        pulled = []

        def endless():
            while True:
                pulled.append(1)
                yield requests_of(harness, 1)[0]

        engine = harness.open(MixtureConfig(), 4)
        stream = engine.generate(endless())
        next(stream)
        assert len(pulled) < 40
        stream.close()
        assert len(list(engine.generate(requests_of(harness, 3)))) == 3

    def test_none_is_waiting_now(self, harness):
        """Guards: a pause between requests that ends the call with requests in flight, or that
        takes one away."""
        requests = requests_of(harness, 9)
        engine = harness.open(MixtureConfig(), 2)
        source = iter([each for request in requests for each in (request, None)])
        found = []
        while len(found) < len(requests):
            before = len(found)
            found += engine.generate(source)
            assert len(found) > before
        assert sorted(c.request.id for c in found) == sorted(r.id for r in requests)

    def test_no_requests(self, harness):
        """Guards: an empty dataset slice."""
        assert list(harness.open(MixtureConfig(), 4).generate([])) == []

    def test_the_context_is_never_exceeded(self, harness):
        """Guards: positions beyond the model's last one; the end of the context is `length`, not an
        error."""
        prompt = tuple([1] * (harness.context_length - 3))
        request = Request("full", 0, 0, prompt, (1, 2), 50)
        [completion] = harness.open(MixtureConfig(), 2).generate([request])
        full = len(completion.token_ids) == 3
        stopped = completion.token_ids[-1] in harness.open(MixtureConfig(), 2).stop_ids
        assert full or stopped
        assert completion.finish_reason == ("stop" if stopped else "length")

    @pytest.mark.parametrize("method", ALPHA_METHODS)
    def test_every_method_solves_for_its_own_alpha(self, harness, method):
        """Guards: a method that takes another's alpha, or the rows of another token."""
        bounds = {} if method in UNBOUNDED_METHODS else {"alpha_min": 0.0}
        mixture = MixtureConfig(
            alpha_method=method, fixed_alpha=0.3, interleaved_min_p=0.3, **bounds
        )
        engine = harness.open(mixture, 8)
        for c in engine.generate(requests_of(harness, 5, new=6)):
            assert c.error == ""
            prompts = {role: c.request.prompt_ids(role) for role in ("student", "teacher")}
            for i, token in enumerate(c.token_ids):
                rows = [harness.logits(x, [*ids, *c.token_ids[:i]]) for x, ids in prompts.items()]
                s, t = prepare(*(row.tolist() for row in rows), mixture)
                q, how = naive.mix(naive.Position(s, t, i, mixture), None)
                alpha = how["alpha"]
                if method == "entropy":  # flat around its maximum, so that alpha is found roughly
                    assert c.trace["entropy"][i] == pytest.approx(naive.shannon(q), abs=2e-4)
                    continue
                assert c.trace["log_q"][i] == pytest.approx(q[token], abs=2e-3)
                apart = [abs(a - b) for a, b in zip(s, t, strict=True) if max(a, b) > -np.inf]
                if max(apart) > 0.01:  # between equal rows any alpha will do
                    assert c.trace["alpha"][i] == pytest.approx(alpha, abs=2e-3, nan_ok=True)
