"""Mixtures without an alpha, the veto, and diagnostics within a support."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import NoiseKeys, draft, gumbel, keys_tensor, rules, step
from optimal_sampling.distribution.naive import kl, log_softmax, naive_step
from optimal_sampling.types import ALPHA_METHODS, TRACE_FIELDS

STUDENT = [1.0, 0.0, -1.0, -2.0, 0.5, -0.5]
TEACHER = [0.0, 1.0, -0.5, -2.0, 1.5, -3.0]
RULES = {
    "veto": MixtureConfig(alpha_method="veto", veto_min_p=0.3),
    "interleaved": MixtureConfig(alpha_method="interleaved", interleaved_top_k=3),
    "interleaved by min-p": MixtureConfig(alpha_method="interleaved", interleaved_min_p=0.3),
    "arithmetic": MixtureConfig(alpha_method="arithmetic", arithmetic_weight=0.3),
}
SUPPORTS = ({"teacher_support_min_p": 0.2}, {"teacher_support_top_k": 7}, {})


def batch(rows, vocab=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=g) * 2
    teacher = student + torch.randn(rows, vocab, generator=g) * 1.5
    position = torch.arange(rows)
    return student, teacher, gumbel(keys_tensor([3] * rows), position, vocab), position


def columns(drawn):
    return dict(zip(TRACE_FIELDS, drawn.trace.double().T, strict=True))


def counts(mixture, draws=200_000):
    position = torch.arange(draws)
    noise = gumbel(keys_tensor([11]).expand(draws), position, 6)
    rows = (torch.tensor(x).expand(draws, -1) for x in (STUDENT, TEACHER))
    return torch.bincount(step(*rows, noise, position, mixture).token, minlength=6).double()


@pytest.mark.parametrize("mixture", RULES.values(), ids=RULES)
def test_draws_follow_q_and_would_not_follow_the_teacher(mixture):
    """Guards: a biased draw. p below 1e-4 by luck once in 10,000; the teacher's is far below."""
    found = counts(mixture)
    teacher = MixtureConfig(alpha_method="fixed", fixed_alpha=1.0)
    p_values = []
    for some in (mixture, teacher):
        log_q = naive_step(STUDENT, TEACHER, [0.0] * 6, 0, some).log_drawn
        q = torch.tensor(log_q, dtype=torch.float64).exp()
        assert not found[q == 0].any()
        expected = q[q > 0] * found.sum()
        p_values.append(stats.chisquare(found[q > 0], expected).pvalue)
    assert p_values[0] > 1e-4
    assert p_values[1] < 1e-9


def test_interleaved_is_the_published_algorithm():
    """Guards: a closed form of another algorithm: the student's token if it is among the teacher's
    k likeliest, else one of the teacher.
    """
    g = torch.Generator().manual_seed(0)
    p_student, p_teacher = (torch.tensor(x).softmax(-1) for x in (STUDENT, TEACHER))
    own = torch.multinomial(p_student, 100_000, replacement=True, generator=g)
    other = torch.multinomial(p_teacher, 100_000, replacement=True, generator=g)
    plausible = torch.isin(own, p_teacher.topk(3).indices)
    by_hand = torch.bincount(torch.where(plausible, own, other), minlength=6).double()
    table = torch.stack([by_hand, counts(RULES["interleaved"])])
    assert stats.chi2_contingency(table).pvalue > 1e-4
    table[0] = torch.bincount(own, minlength=6)
    assert stats.chi2_contingency(table).pvalue < 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(-3, 3), min_size=12, max_size=12))
def test_veto_is_the_information_projection(seed, other):
    """Guards: a q on the plausible tokens that is further from the student than need be.

    KL(q||p_student) = -log p_student(S), and no distribution on S has less.
    """
    student, teacher, noise, position = batch(1, 12, seed)
    drawn = step(
        student, teacher, noise, position, MixtureConfig(alpha_method="veto"), keep_log_q=True
    )
    of = {name: x.item() for name, x in columns(drawn).items()}
    s, t = (log_softmax(x[0].tolist()) for x in (student, teacher))
    inside = [x >= max(t) + math.log(0.1) for x in t]
    mass = math.fsum(math.exp(x) for x, kept in zip(s, inside, strict=True) if kept)
    assert of["kl_student"] == pytest.approx(-math.log(mass), abs=1e-5)
    assert of["vetoed"] == pytest.approx(1 - mass, abs=1e-6)
    assert of["kl_student_restricted"] == pytest.approx(0, abs=1e-6)
    assert (of["alpha"], of["clamped"], of["fallback"]) == (0.0, 0.0, 0.0)
    assert drawn.log_q[0].isfinite().tolist() == inside
    another = log_softmax([x if kept else -math.inf for x, kept in zip(other, inside, strict=True)])
    assert kl(another, s) >= of["kl_student"] - 1e-5


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_plain_names_are_about_the_unrestricted_models(method, support):
    """Guards: a KL to a student that was cut to the teacher's tokens: 0 where the truth is not."""
    student, teacher, noise, position = batch(40)
    mixture = MixtureConfig(alpha_method=method, **support)
    drawn = step(student, teacher, noise, position, mixture, keep_log_q=True)
    of = columns(drawn)
    q = drawn.log_q.double()
    for role, logits in (("student", student), ("teacher", teacher)):
        log_p = logits.double().log_softmax(-1)
        terms = torch.where(q > -math.inf, q.exp() * (q - log_p), 0.0)
        torch.testing.assert_close(of[f"kl_{role}"], terms.sum(-1), rtol=0, atol=2e-5)
        token = log_p.gather(-1, drawn.token[:, None])[:, 0]
        torch.testing.assert_close(of[f"log_p_{role}"], token, rtol=0, atol=2e-5)
        share = 1 / (2 * q - log_p).exp().sum(-1)
        torch.testing.assert_close(of[f"ess_{role}"], share, rtol=1e-4, atol=1e-6)
    if method != "interleaved":  # whose own set moves mass within the support
        gap = of["kl_student"] - of["kl_student_restricted"]
        torch.testing.assert_close(gap, -torch.log1p(-of["vetoed"]), rtol=1e-4, atol=2e-5)
    restricted = method == "veto" or bool(support)
    assert bool((of["vetoed"] > 1e-3).any()) == (restricted or method == "interleaved")


@pytest.mark.parametrize("truncation", [{}, {"top_k": 1}, {"temperature": 0.5}])
def test_a_draft_fails_only_where_the_teacher_objects(truncation):
    """Guards: drafts of another noise or sharpness than the run has, which fail for no reason."""
    student, teacher, noise, position = batch(2000)
    mixture = MixtureConfig(alpha_method="veto", **truncation)
    drafted = draft(student, noise, mixture)
    accepted = drafted == step(student, teacher, noise, position, mixture).token
    t = teacher / mixture.temperature
    plausible = t.gather(-1, drafted[:, None])[:, 0] >= t.amax(-1) + math.log(0.1)
    assert torch.equal(accepted, plausible)
    assert 0.5 < accepted.double().mean() < 0.95


@pytest.mark.parametrize("vocab", [30, 400])
@pytest.mark.parametrize(
    "truncation", [{"top_k": 1}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}]
)
def test_drafts_are_within_the_runs_own_truncation(truncation, vocab):
    """Guards: a draft that a truncated run can never accept, and noise of another token."""
    student, _, made, position = batch(50, vocab)
    mixture = MixtureConfig(temperature=0.8, **truncation)
    drafted = draft(student, made, mixture)
    alone = MixtureConfig(alpha_method="fixed", fixed_alpha=0.0, alpha_min=0.0, temperature=0.8)
    exact = step(student, student, made, position, replace(alone, **truncation)).token
    assert torch.equal(drafted, exact)
    keys = NoiseKeys(keys_tensor([3] * 50), position)
    assert torch.equal(draft(student, keys, mixture), drafted)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("vocab", [5, 5000])
@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_a_student_without_the_teachers_support(method, vocab, temperature):
    """Guards: NaN, or a token of probability 0, where the student has nothing that is plausible."""
    student, teacher, noise, position = batch(2, vocab)
    teacher[:, 1] = 50.0
    student[0, 1] = -math.inf
    mixture = MixtureConfig(alpha_method=method, teacher_support_min_p=0.9, temperature=temperature)
    drawn = step(student, teacher, noise, position, mixture)
    of = {name: x[0].item() for name, x in columns(drawn).items()}
    assert drawn.token.tolist() == [1, 1]
    assert not any(map(math.isnan, of.values()))
    assert (of["alpha"], of["fallback"], of["vetoed"]) == (1.0, 1.0, 1.0)
    assert (of["kl_student"], of["log_p_student"]) == (math.inf, -math.inf)
    assert (of["log_q"], of["kl_teacher_restricted"]) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["interleaved", "arithmetic"])
def test_a_row_of_log_q_has_its_own_bits(name, dtype):
    """Guards: functions whose vectorised loop and its scalar tail differ in the last bit."""
    student, teacher, *_ = (x.to(dtype) for x in batch(37, 13))
    rows = [x.log_softmax(-1) for x in (student, teacher)]
    together, _ = rules.RULES[name](*rows, RULES[name])
    for row in range(37):
        alone, _ = rules.RULES[name](*(x[row : row + 1].clone() for x in rows), RULES[name])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("mixture", RULES.values(), ids=RULES)
def test_the_first_token_can_be_forced(mixture):
    """Guards: a rule without alpha that ignores `force_first_token`."""
    student, teacher, noise, _ = batch(2)
    forced = replace(mixture, force_first_token=True)
    drawn = step(student, teacher, noise, torch.tensor([0, 1]), forced, keep_log_q=True)
    plain = step(student, teacher, noise, torch.tensor([0, 1]), mixture, keep_log_q=True)
    kept = plain.log_q[0].isfinite()
    expected = teacher[0].masked_fill(~kept, -math.inf).log_softmax(-1)
    torch.testing.assert_close(drawn.log_q[0], expected)
    torch.testing.assert_close(drawn.log_q[1], plain.log_q[1])
    alpha = columns(drawn)["alpha"]
    assert alpha[0] == 1
    assert alpha[1] == 0 or alpha[1].isnan()


def test_supports_intersect():
    """Guards: a nucleus of what min-p has left, which is smaller; one that replaces the other."""
    student = torch.zeros(1, 5)
    teacher = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05]]).log()
    noise, position = torch.zeros(1, 5), torch.tensor([0])

    def kept(**options):
        drawn = step(student, teacher, noise, position, MixtureConfig(**options), keep_log_q=True)
        return drawn.log_q[0].isfinite().sum().item()

    assert kept(teacher_support_min_p=0.2) == 4
    assert kept(teacher_support_min_p=0.5, teacher_support_top_p=0.9) == 2
    assert kept(teacher_support_min_p=0.2, teacher_support_top_p=0.69) == 2
    assert kept(teacher_support_min_p=0.2, teacher_support_top_k=3) == 3
    assert kept(alpha_method="veto", veto_min_p=0.5, teacher_support_min_p=0.2) == 2
    assert kept(alpha_method="veto", veto_min_p=0.2, teacher_support_top_k=3) == 3


@pytest.mark.parametrize("vocab", [40, 5000])
def test_a_support_has_the_precision_of_the_logits(vocab):
    """Guards: a share of the largest that is rounded to the digits of logits far from 0."""
    student, _, noise, position = batch(1, vocab)
    grain = 2.0**-11  # of float32 near 5000
    teacher = torch.full((1, vocab), -5100.0)
    teacher[0, :3] = -5000 - grain * torch.tensor([0.0, 200.0, 201.0])
    mixture = MixtureConfig(alpha_method="veto", veto_min_p=math.exp(-200.6 * grain))
    kept = step(student, teacher, noise, position, mixture, keep_log_q=True).log_q[0].isfinite()
    assert kept.nonzero().flatten().tolist() == [0, 1]
