"""`step` against the naive oracle, and its promises on rows, dtypes, supports and bad input."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimal_sampling.config import MIN_TEMPERATURE, MixtureConfig
from optimal_sampling.distribution import (
    METHODS,
    Drawn,
    arrays,
    draft,
    draw,
    gumbel,
    keys_tensor,
    log_q,
    solve,
    solve_single,
    step,
    trace_of,
)
from optimal_sampling.distribution.cpu.tiled import TiledPair
from optimal_sampling.distribution.naive import (
    NAIVE_METHODS,
    NAIVE_RULES,
    kl,
    naive_step,
    prepare,
    scaled,
    slope,
)
from optimal_sampling.distribution.rules import RULES
from optimal_sampling.types import ALPHA_METHODS, TRACE_FIELDS, UNBOUNDED_METHODS

INF = math.inf


def bounded(method, low=0.0, **options):
    """The mixture of a method, with a lower bound where it has bounds."""
    bounds = {} if method in UNBOUNDED_METHODS else {"alpha_min": low}
    return MixtureConfig(alpha_method=method, **bounds, **options)


def trace_row(result: Drawn, row: int = 0) -> dict[str, float]:
    return dict(zip(TRACE_FIELDS, result.trace[row].tolist(), strict=True))


def one(student, teacher, mixture, *, noise=None, position=0, keep_log_q=True) -> Drawn:
    student, teacher = (
        torch.tensor([student], dtype=torch.float32),
        torch.tensor([teacher], dtype=torch.float32),
    )
    noise = torch.zeros_like(student) if noise is None else noise
    return step(student, teacher, noise, torch.tensor([position]), mixture, keep_log_q=keep_log_q)


def batch(rows, vocab, seed=0, spread=3.0, apart=1.5):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=g) * spread
    teacher = student + torch.randn(rows, vocab, generator=g) * apart
    return (
        student,
        teacher,
        gumbel(keys_tensor(range(rows)), torch.arange(rows), vocab),
        torch.arange(rows),
    )


def logits(scale):
    finite = st.floats(-1.0, 1.0, width=16, allow_subnormal=False).map(lambda x: x * scale)
    return st.one_of(finite, finite, finite, st.just(-INF))


@st.composite
def pairs(draw, scales=(2**-7, 1.0, 8.0, 64.0)):
    vocab, scale = draw(st.integers(1, 12)), draw(st.sampled_from(scales))
    row = st.lists(logits(scale), min_size=vocab, max_size=vocab).filter(lambda x: max(x) > -INF)
    return draw(row), draw(row)


@st.composite
def mixtures(draw):
    low, high = draw(st.sampled_from([0.0, 0.25, 0.5])), draw(st.sampled_from([0.75, 1.0]))
    method = draw(st.sampled_from(ALPHA_METHODS))
    bounds = {} if method in UNBOUNDED_METHODS else {"alpha_min": low, "alpha_max": high}
    return MixtureConfig(
        alpha_method=method,
        fixed_alpha=min(max(draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])), low), high),
        **bounds,
        veto_min_p=draw(st.sampled_from([0.1, 0.9])),
        interleaved_top_k=draw(st.sampled_from([2, 25])),
        interleaved_min_p=draw(st.sampled_from([None, 0.2])),
        arithmetic_weight=draw(st.sampled_from([0.0, 0.3, 1.0])),
        teacher_support_min_p=draw(st.sampled_from([None, None, 0.05])),
        trust_region=draw(st.sampled_from([0.01, 0.3])),
        schedule_tokens=10,
        teacher_support_top_k=draw(st.sampled_from([-1, -1, 1, 3])),
        teacher_support_top_p=draw(st.sampled_from([1.0, 1.0, 0.7])),
        force_first_token=draw(st.booleans()),
        temperature=draw(st.sampled_from([1.0, 0.7, 2.0])),
        top_k=draw(st.sampled_from([-1, -1, 1, 3])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.6])),
    )


def near_cut(scores, top_p):
    """True where float32 and float64 could cut the nucleus at different tokens."""
    order, mass = sorted(scores, reverse=True), 0.0
    for a in order:
        mass += math.exp(a)
        if top_p < 1 and abs(mass - top_p) < 1e-4:
            return True
    return any(0 < a - b < 1e-4 for a, b in itertools.pairwise(order))


def near_veto(t, mixture):
    """True where float32 and float64 could put a token on other sides of a share of the largest."""
    shares = (mixture.veto_min_p, mixture.interleaved_min_p, mixture.teacher_support_min_p)
    cuts = [max(t) + math.log(share) for share in shares if share is not None]
    return any(abs(value - cut) < 1e-4 for value in t for cut in cuts)


def close(got, want, scale=1.0):
    if math.isinf(want) or math.isinf(got):
        return got == want or min(got, want) < -1e4
    return abs(got - want) <= 2e-5 * max(1.0, scale, abs(want))


def test_every_method_has_a_fast_and_a_naive_function():
    """Guards: a method that the config accepts and `step` lacks, or one without an oracle."""
    assert {*METHODS, *RULES} == set(ALPHA_METHODS) == {*NAIVE_METHODS, *NAIVE_RULES}


@settings(max_examples=600, deadline=None)
@given(pairs(), mixtures(), st.integers(0, 12))
def test_diagnostics_and_distribution_equal_the_oracle(pair, mixture, position):
    """Guards: any wrong formula, support or truncation, at the alpha that the fast code chose."""
    student, teacher = ([float(torch.tensor(x)) for x in row] for row in pair)
    result = one(student, teacher, mixture, position=position)
    got = trace_row(result)
    t = scaled(teacher, mixture)
    if near_veto(t, mixture) or near_cut(t, mixture.teacher_support_top_p):
        return
    alpha = got["alpha"]
    want = naive_step(student, teacher, [0.0] * len(student), position, mixture, alpha=alpha)
    has_alpha = not math.isnan(want.trace["alpha"])
    assert [name for name, x in got.items() if math.isnan(x)] == ([] if has_alpha else ["alpha"])
    assert got["fallback"] == want.trace["fallback"]
    top = max([1.0] + [abs(x) for x in student + teacher if x > -INF]) / mixture.temperature
    for name in want.trace.keys() - {"alpha", "clamped", "curvature", "fallback"}:
        if not name.startswith("log_"):  # of a token, which rounding may change
            assert close(got[name], want.trace[name], top), name
    # a difference of large numbers: what float64 and the float32 weights leave of it
    assert close(got["curvature"], want.trace["curvature"], top * top)
    untruncated = naive_step(
        student,
        teacher,
        [0.0] * len(student),
        0,
        replace(mixture, top_k=-1, top_p=1.0),
        alpha=alpha,
    ).log_drawn
    if not near_cut(untruncated, mixture.top_p):
        for a, b in zip(result.log_q[0].tolist(), want.log_drawn, strict=True):
            assert close(a, b, top)


@settings(max_examples=500, deadline=None)
@given(pairs(), mixtures(), st.integers(0, 12))
def test_alpha_equals_the_oracle(pair, mixture, position):
    """Guards: a method that solves for the wrong alpha, and a clamped flag that does not say what
    happened.
    """
    mixture = replace(mixture, teacher_support_top_p=1.0, top_p=1.0)
    student, teacher = ([float(torch.tensor(x)) for x in row] for row in pair)
    got = trace_row(one(student, teacher, mixture, position=position))
    s, t = prepare(student, teacher, mixture)
    if near_cut(t, 1.0) and mixture.teacher_support_top_k > 0:
        return
    if near_veto(scaled(teacher, mixture), mixture):
        return
    want = naive_step(student, teacher, [0.0] * len(student), position, mixture)
    assert got["fallback"] == want.trace["fallback"]
    if math.isnan(want.trace["alpha"]):
        assert math.isnan(got["alpha"])
        return
    if abs(got["alpha"] - want.trace["alpha"]) < 1e-5:
        return
    at = naive_step(student, teacher, [0.0] * len(student), position, mixture, alpha=got["alpha"])
    assert mixture.alpha_min - 1e-6 <= got["alpha"] <= mixture.alpha_max + 1e-6
    top = max([1.0] + [abs(x) for x in s + t if x > -INF])
    flat = 2e-6 * top
    if mixture.alpha_method in ("kl_symmetry", "mirror"):
        flip = mixture.alpha_method == "mirror"
        residual = slope(s, t, 1 - got["alpha"] if flip else got["alpha"])
        wanted = slope(s, t, 1 - want.trace["alpha"] if flip else want.trace["alpha"])
        assert abs(residual - wanted) <= flat
    elif mixture.alpha_method == "entropy":
        assert at.trace["entropy"] >= want.trace["entropy"] - 1e-5
    elif mixture.alpha_method == "trust_region":
        name = "kl_student_restricted"
        assert abs(at.trace[name] - want.trace[name]) <= flat
    elif mixture.alpha_method == "reverse_kl_symmetry":
        assert abs(got["alpha"] - want.trace["alpha"]) * min(1.0, kl(s, t) + kl(t, s)) <= flat
    elif mixture.alpha_method == "ess_balance":
        ess_student, ess_teacher = (
            at.trace[f"ess_{role}"] / mass for role, mass in mass_of(student, teacher, mixture)
        )
        assert abs(ess_student - ess_teacher) <= 1e-4
    else:
        raise AssertionError("alpha of this method has a closed form")


def mass_of(student, teacher, mixture):
    """p(S) of both models, with S the teacher's support."""
    whole = replace(mixture, teacher_support_top_k=-1, teacher_support_min_p=None)
    kept, all_of_it = prepare(student, teacher, mixture), prepare(student, teacher, whole)
    for role, some, every in zip(("student", "teacher"), kept, all_of_it, strict=True):
        yield role, sum(math.exp(b) for a, b in zip(some, every, strict=True) if a > -INF) or 1.0


def test_drawn_token_is_the_oracles():
    """Guards: a draw from anything but log q + noise: another alpha, a truncation forgotten, an
    off-by-one id.
    """
    for seed in range(30):
        student, teacher, noise, position = batch(3, 20, seed)
        mixture = MixtureConfig(top_p=0.8 if seed % 2 else 1.0, top_k=5 if seed % 3 else -1)
        result = step(student, teacher, noise, position, mixture)
        for row in range(3):
            want = naive_step(
                student[row].tolist(), teacher[row].tolist(), noise[row].tolist(), row, mixture
            )
            got = trace_row(result, row)
            assert result.token[row] == want.token
            for name in TRACE_FIELDS:
                assert abs(got[name] - want.trace[name]) < 2e-5, name


def test_certificate_on_free_tokens():
    """Guards: KLs that are not those of the solved alpha. There KL(q||s) = KL(q||t) = -F for every
    token.
    """
    student, teacher, noise, position = batch(200, 272, apart=3.0)
    result = step(student, teacher, noise, position, MixtureConfig(alpha_min=0.0), keep_log_q=True)
    alpha, clamped, kl_student, kl_teacher = result.trace[:, :4].double().T
    assert not clamped.any()
    F = torch.lerp(
        student.double().log_softmax(-1), teacher.double().log_softmax(-1), alpha[:, None]
    ).logsumexp(-1)
    for other in (kl_teacher, -F):
        torch.testing.assert_close(kl_student, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("vocab", "counts"), [(1, (1, 5)), (67, (1, 37, 130)), (272, (1, 2, 37)), (20_001, (1, 5))]
)
@pytest.mark.parametrize(
    "method", ["kl_symmetry", "trust_region", "entropy", "veto", "interleaved", "arithmetic"]
)
def test_rows_are_bitwise_independent(vocab, counts, method):
    """Guards: sums, scalar tails of vectorised loops or loops' ends that depend on what shares the
    batch.
    """
    if vocab > 10_000 and method == "entropy":
        return
    rows = counts[-1]
    student, teacher, noise, position = batch(rows, vocab)
    student[:, ::3] *= torch.logspace(-3, 1, rows)[:, None]
    mixture = bounded(method, 0.1, force_first_token=True)
    whole = step(student, teacher, noise, position, mixture).pack().nan_to_num(-1)
    for count in counts:
        for first in range(0, rows - count + 1, max(1, (rows - count) // 3)):
            part = slice(first, first + count)
            some = step(student[part], teacher[part], noise[part], position[part], mixture).pack()
            assert torch.equal(some.nan_to_num(-1), whole[part])


def test_a_row_beside_one_with_an_underflow_keeps_its_bits():
    """Guards: sums relative to the largest score, for all rows of a block where one needs them.

    Row 0 took the score of its masked tokens, -1e18, into its entropy.
    """
    student = torch.zeros(2, 5000)
    teacher = torch.full((2, 5000), -INF)
    student[0, :2], teacher[0, :2] = torch.tensor([[-36.0, -37.0], [0.0, -1.0]])
    student[1, 2], teacher[1, 2] = -200.0, 0.0
    assert_first_row_is_independent(student, teacher, "entropy")


@pytest.mark.parametrize("temperature", [0.6, 2.0, 7.0])
@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_tokens_that_no_model_has_change_nothing(method, temperature):
    """Guards: a large vocabulary at a high temperature, whose impossible tokens had a finite
    log-probability: supports that did not meet met there, with nothing to draw from.
    """
    student, teacher, noise, position = batch(4, 40)
    student[0, :20], teacher[0, 20:] = -INF, -INF
    student[1, ::2], teacher[2, ::2] = -INF, -INF
    mixture = replace(bounded(method), temperature=temperature)
    small = step(student, teacher, noise, position, mixture, keep_log_q=True)
    padded = [torch.nn.functional.pad(x, (0, 4960), value=-INF) for x in (student, teacher)]
    wide_noise = torch.nn.functional.pad(noise, (0, 4960))
    wide = step(*padded, wide_noise, position, mixture, keep_log_q=True)
    assert torch.equal(wide.token, small.token)
    torch.testing.assert_close(wide.log_q[:, :40], small.log_q, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(wide.trace, small.trace, atol=1e-3, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("method", ["fixed", "mirror"])
def test_a_small_row_beside_one_with_an_underflow_keeps_its_bits(method):
    """Guards: scores that are shifted by their largest in every row where one needs it.

    Models that are far apart had other bits in tiny values of the trace.
    """
    for seed in range(20):
        student, teacher, *_ = batch(2, 30, seed, apart=30.0)
        student[1, 3] = -2000.0
        assert_first_row_is_independent(student, teacher, method)


def assert_first_row_is_independent(student, teacher, method):
    mixture = bounded(method)
    rows = student, teacher, torch.zeros_like(student), torch.arange(len(student))
    together = step(*rows, mixture, keep_log_q=True)
    alone = step(*(x[:1] for x in rows), mixture, keep_log_q=True)
    assert torch.equal(alone.pack()[0], together.pack()[0])
    assert torch.equal(alone.log_q[0], together.log_q[0])


@pytest.mark.parametrize(
    ("student", "teacher", "temperature"),
    [([0, -800], [-1, 0], 1.0), ([0, -100], [0, 0], 0.1), ([0, -800, -INF], [-1, 0, 0], 1.0)],
)
def test_ess_where_a_probability_underflows(student, teacher, temperature):
    """Guards: 1 / sum q^2/p with a p that is clamped at e^-700: 1.0 where it is 0.27."""
    for alpha in (0.5, 1.0):
        mixture = MixtureConfig(
            alpha_method="fixed", fixed_alpha=alpha, temperature=temperature, alpha_min=0.0
        )
        got = trace_row(one(student, teacher, mixture))
        want = naive_step(student, teacher, [0.0] * len(student), 0, mixture).trace
        for name in ("ess_student", "ess_teacher"):
            assert close(got[name], want[name]), (name, alpha)


def test_rows_are_bitwise_independent_on_two_threads():
    """Guards: sums that are split among threads where the batch is large."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for vocab in (272, 20_001):
            student, teacher, noise, position = batch(130, vocab)
            whole = step(student, teacher, noise, position, MixtureConfig()).pack()
            for part in (slice(0, 1), slice(64, 67), slice(129, 130)):
                some = step(
                    student[part], teacher[part], noise[part], position[part], MixtureConfig()
                ).pack()
                assert torch.equal(some, whole[part])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "mixture", [MixtureConfig(alpha_min=0.1), MixtureConfig(teacher_support_top_k=40, top_p=0.9)]
)
@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_whole_and_tiled_agree(method, mixture):
    """Guards: two ways to the same sums that drift apart."""
    student, teacher, noise, position = batch(40, 300)
    student[:, ::7], teacher[3:, ::5], student[9], teacher[8] = -INF, -INF, math.nan, -INF
    if method in UNBOUNDED_METHODS:
        mixture = replace(mixture, alpha_min=0.5)
    mixture = replace(mixture, alpha_method=method)
    direct = step(student, teacher, noise, position, mixture)
    with np.errstate(all="ignore"):
        solved = solve(TiledPair(student, teacher, mixture), position, mixture)
        token, log_q = draw(solved, noise)
        trace = trace_of(solved, token, log_q)
    assert method == "entropy" or torch.equal(direct.token, token)
    flat = method == "entropy"  # around its maximum
    traces = (direct.trace[:, 6], trace[:, 6]) if flat else (direct.trace, trace)
    torch.testing.assert_close(*traces, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("vocab", [50, 20_001])
@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_bad_rows_disturb_nobody(method, vocab):
    """Guards: one NaN request that fails, slows or changes its neighbours, now or later."""
    student, teacher, noise, position = batch(6, vocab)
    mixture = MixtureConfig(alpha_method=method)
    good = step(student, teacher, noise, position, mixture).pack()
    student, teacher = torch.cat([student] * 2), torch.cat([teacher] * 2)
    student[6, vocab // 2], student[7], student[8, 0], teacher[9, -1], teacher[10] = (
        math.nan,
        -INF,
        INF,
        math.nan,
        -INF,
    )
    result = step(
        student,
        teacher,
        torch.cat([noise] * 2),
        torch.cat([position] * 2),
        mixture,
        keep_log_q=True,
    )
    assert result.bad_student.tolist() == [False] * 6 + [True] * 3 + [False] * 3
    assert result.bad_teacher.tolist() == [False] * 9 + [True] * 2 + [False]
    assert result.trace[6:11].isnan().all()
    assert result.log_q[6:11].isnan().all()
    assert not result.token[6:11].any()
    torch.testing.assert_close(result.pack()[:6], good, rtol=1e-6, atol=1e-6, equal_nan=True)
    again = step(student[:6], teacher[:6], noise, position, mixture).pack()
    assert torch.equal(again.nan_to_num(-1), good.nan_to_num(-1))  # no alpha is NaN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_float32_inside(dtype):
    """Guards: mathematics in the models' 16 bits."""
    student, teacher, noise, position = batch(5, 300)
    student, teacher = student.to(dtype), teacher.to(dtype)
    for mixture in (MixtureConfig(), MixtureConfig(temperature=0.7)):
        got = step(student, teacher, noise, position, mixture).pack()
        assert torch.equal(
            got, step(student.float(), teacher.float(), noise, position, mixture).pack()
        )
    assert torch.equal(draft(student, noise, mixture), draft(student.float(), noise, mixture))


def chi_square(student, teacher, q, mixture, draws=400_000):
    """Statistic of 400,000 draws against q."""
    counts, keys = torch.zeros_like(q), keys_tensor([11] * 4000)
    logits = (torch.tensor(student).expand(4000, -1), torch.tensor(teacher).expand(4000, -1))
    for first in range(0, draws, 4000):
        position = torch.arange(first, first + 4000)
        token = step(*logits, gumbel(keys, position, len(q)), position, mixture).token
        counts += torch.bincount(token, minlength=len(q))
    return float(((counts - draws * q) ** 2 / (draws * q)).sum())


def test_draws_follow_q_and_would_not_follow_the_teacher():
    """Guards: a biased draw. 5 degrees of freedom: 25.7 is exceeded by luck once in 10,000; the
    teacher's is not.
    """
    student, teacher = [1.0, 0.0, -1.0, -2.0, 0.5, -0.5], [0.0, 1.0, -0.5, -2.0, 1.5, -3.0]
    mixture = MixtureConfig(alpha_min=0.0)
    q = torch.tensor(naive_step(student, teacher, [0.0] * 6, 0, mixture).log_drawn).exp()
    assert chi_square(student, teacher, q, mixture) < 25.7
    assert (
        chi_square(student, teacher, q, MixtureConfig(alpha_method="fixed", fixed_alpha=1.0)) > 1000
    )


def test_ties_at_the_cut_go_to_the_smaller_id():
    """Guards: a k-th place that depends on the sort's mood, and an empty nucleus."""
    scores = [0.0, 1.0, 1.0, 1.0, 0.0]
    assert one(scores, scores, MixtureConfig(top_k=2)).log_q[0].isfinite().tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert (
        one(scores, scores, MixtureConfig(top_p=1e-6)).log_q[0].isfinite().tolist()
        == [False, True] + [False] * 3
    )
    restricted = one(scores, scores, MixtureConfig(teacher_support_top_k=1))
    assert restricted.token.item() == 1
    assert trace_row(restricted)["log_p_student_restricted"] == 0.0
    log_p = torch.tensor(scores).log_softmax(-1)[1].item()
    assert trace_row(restricted)["log_p_student"] == pytest.approx(log_p)


def test_supports():
    """Guards: NaN or a token of probability 0 where the models' supports differ."""
    student, teacher = [0.0, 0.0, -INF, -INF], [-INF, 0.0, 0.0, -INF]
    fixed = MixtureConfig(alpha_method="fixed", alpha_min=0.0)
    for alpha, support in ((0.0, [0, 1]), (0.5, [1]), (1.0, [1, 2])):
        result = one(student, teacher, replace(fixed, fixed_alpha=alpha))
        assert result.log_q[0].isfinite().nonzero().flatten().tolist() == support
        assert not result.trace.isnan().any()
    for method in METHODS:
        result = one([0.0, -INF], [-INF, 0.0], MixtureConfig(alpha_method=method))
        assert result.token.item() == 1
        trace = trace_row(result)
        assert (trace["alpha"], trace["fallback"], trace["clamped"], trace["kl_teacher"]) == (
            1.0,
            1.0,
            0.0,
            0.0,
        )
        assert (trace["kl_student"], trace["ess_student"], trace["log_p_student"]) == (
            INF,
            0.0,
            -INF,
        )


def test_first_token_is_the_teachers():
    """Guards: forcing at the wrong position, or a forced token counted as clamped."""
    student, teacher, noise, _ = batch(2, 30)
    mixture = MixtureConfig(force_first_token=True, alpha_max=0.6)
    trace = step(student, teacher, noise, torch.tensor([0, 1]), mixture).trace
    assert trace[0, :2].tolist() == [1.0, 0.0]
    assert trace[1, 0] <= 0.6 + 1e-6


def test_identical_models():
    """Guards: division by the zero variance of a self-distillation pair without privileged
    information.
    """
    student, _, noise, position = batch(4, 100)
    for method in ALPHA_METHODS:
        if method in ("veto", "interleaved"):
            continue  # they cut or move what lies outside of their sets
        result = step(student, student.clone(), noise, position, MixtureConfig(alpha_method=method))
        assert not result.trace[:, int(method in RULES) :].isnan().any()
        assert torch.equal(result.token, draft(student, noise, MixtureConfig()))
        assert result.trace[:, 2:4].abs().max() < 1e-6


def test_large_vocabulary_agrees_with_a_small_one():
    """Guards: tiles. The same 500 tokens, spread over 262,144 of which the rest are impossible."""
    student, teacher, noise, position = batch(2, 500)
    ids = torch.arange(500) * 524
    wide = [torch.full((2, 262_144), -INF).index_copy(1, ids, x) for x in (student, teacher, noise)]
    small = step(student, teacher, noise, position, MixtureConfig(top_p=0.9))
    large = step(*wide, position, MixtureConfig(top_p=0.9))
    assert large.token.tolist() == ids[small.token].tolist()
    torch.testing.assert_close(large.trace, small.trace, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_no_rows(method):
    """Guards: a round in which no request has a token to draw."""
    empty = torch.zeros(0, 9)
    result = step(
        empty, empty, empty, torch.zeros(0, dtype=torch.int64), MixtureConfig(alpha_method=method)
    )
    assert result.pack().shape == (0, 3 + len(TRACE_FIELDS))


def test_pack_keeps_large_ids():
    """Guards: token ids rounded on their way to the host."""
    trace = torch.rand(2, len(TRACE_FIELDS))
    bad_student = torch.tensor([True, False])
    packed = Drawn(torch.tensor([262_143, 1]), trace, bad_student, ~bad_student).pack()
    assert packed[:, :3].tolist() == [[262_143, 1, 0], [1, 0, 1]]
    assert torch.equal(packed[:, 3:], trace)


@pytest.mark.parametrize("method", ALPHA_METHODS)
def test_tensors_and_arrays_agree(method, monkeypatch):
    """Guards: the branch for accelerators without Triton, here with tensors on a CPU: calls that
    only NumPy takes.
    """
    student, teacher, noise, position = batch(9, 40)
    student[1:5, ::3], teacher[2:5, ::4], student[6], teacher[7] = -INF, -INF, math.nan, -INF
    student[5, ::2], teacher[5, 1::2] = -INF, -INF
    mixtures = [bounded(method, low) for low in (0.0, 0.5)]
    mixtures.append(
        MixtureConfig(
            alpha_method=method, teacher_support_top_k=9, top_p=0.9, force_first_token=True
        )
    )
    wanted = [
        step(student, teacher, noise, position, mixture, keep_log_q=True) for mixture in mixtures
    ]
    monkeypatch.setattr(arrays, "NUMPY_DEVICES", frozenset())
    for mixture, want in zip(mixtures, wanted, strict=True):
        got = step(student, teacher, noise, position, mixture, keep_log_q=True)
        flat = method == "entropy"  # around its maximum
        assert flat or torch.equal(got.token, want.token)
        traces = (got.trace[:, 6], want.trace[:, 6]) if flat else (got.trace, want.trace)
        torch.testing.assert_close(*traces, rtol=2e-5, atol=2e-5, equal_nan=True)
        assert torch.equal(got.bad_student, want.bad_student)
        assert torch.equal(got.log_q.isnan(), want.log_q.isnan())


@pytest.mark.parametrize("vocab", [20, 5000])
def test_the_lowest_temperature_gives_the_distribution(vocab):
    """Guards: a temperature that is accepted and at which float32 draws from something else.

    Two logits are apart by about the temperature; total variation to the float64 oracle.
    """
    mixture = MixtureConfig(temperature=MIN_TEMPERATURE, alpha_min=0.0)
    student, teacher, noise, position = batch(3, vocab)
    for row, gap in enumerate((0.3, 1.0, 3.0)):
        student[row, :2] = torch.tensor([30.0, 30.0 + gap * MIN_TEMPERATURE])
        teacher[row, :2] = torch.tensor([30.0 + gap * MIN_TEMPERATURE, 30.0])
    mixed = step(student, teacher, noise, position, mixture, keep_log_q=True)
    alone = log_q(solve_single(student, mixture, "student"))
    for row in range(3):
        rows = (student[row].tolist(), teacher[row].tolist())
        alpha = mixed.trace[row, 0].item()
        want = naive_step(*rows, [0.0] * vocab, row, mixture, alpha=alpha).log_drawn
        assert total_variation(mixed.log_q[row], want) < 1e-5
        assert total_variation(alone[row], prepare(*rows, mixture)[0]) < 1e-5


@pytest.mark.parametrize("vocab", [50, 20_001])
@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 0.01, 0.3])
def test_log_p_at_a_small_temperature(vocab, temperature):
    """Guards: logits that lose their digits when they are divided by the temperature, so that the
    only possible token has log p of -0.001."""
    mixture = MixtureConfig(temperature=temperature, alpha_min=0.0)
    student, teacher, noise, position = batch(4, vocab)
    for row, gap in enumerate((0.7, 2.0)):
        student[row, 3:5] = torch.tensor([31.7, 31.7 + gap * temperature])
        teacher[row, 3:5] = torch.tensor([29.3 + gap * temperature, 29.3])
    student[2:, 7] = teacher[2:, 7] = 33.3
    drawn = step(student, teacher, noise, position, mixture)
    for row in range(4):
        rows = (student[row].tolist(), teacher[row].tolist())
        token = int(drawn.token[row])
        log_p = [each[token] for each in prepare(*rows, mixture)]
        got = trace_row(drawn, row)
        assert got["log_p_student"] == pytest.approx(log_p[0], abs=2e-6)
        assert got["log_p_teacher"] == pytest.approx(log_p[1], abs=2e-6)
        single = log_q(solve_single(student, mixture, "student"))
        assert float(single[row, token]) == pytest.approx(log_p[0], abs=2e-6)


def total_variation(log_p, log_q):
    return (log_p.double().exp() - torch.tensor(log_q).double().exp()).abs().sum().item() / 2
