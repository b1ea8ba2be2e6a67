"""The claims of docs/theory.md, in float64.

Each is compared with an enumeration or with a search that does not use it, on random and on made-up
pairs of laws, and then with the package's own answer. Laws are rows of probabilities; `s` is the
student, `t` the teacher, `d` = log t - log s.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import draft, gumbel, keys_tensor, step
from optimal_sampling.types import TRACE_FIELDS, UNBOUNDED_METHODS

ROOT = Path(__file__).parents[2]
FREE = {"alpha_min": 0.0, "alpha_max": 1.0}
INF = math.inf


# Laws and what is taken of them, written out


def mix(s, t, alpha):
    """q of the geometric mixture, and F = log of what normalises it."""
    scores = (1 - alpha) * np.log(s) + alpha * np.log(t)
    top = scores.max()
    F = top + math.log(np.exp(scores - top).sum())
    return np.exp(scores - F), F


def kl(p, q):
    """KL(p||q); infinite where p has what q lacks."""
    some = p > 0
    if (q[some] == 0).any():
        return INF
    return float((p[some] * (np.log(p[some]) - np.log(q[some]))).sum())


def entropy(p):
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def tv(p, q):
    return 0.5 * float(np.abs(p - q).sum())


def both_kl(q, s, t):
    return kl(q, s), kl(q, t)


def equal_kl(s, t, reverse=False):
    """The alpha at which the two KLs are equal, searched from the KLs themselves."""

    def lead(alpha):
        q, _ = mix(s, t, alpha)
        to_student, to_teacher = both_kl(q, s, t)
        return kl(t, q) - kl(s, q) if reverse else to_teacher - to_student

    return brentq(lead, 1e-14, 1 - 1e-14, xtol=1e-15)


def random_pairs(count=60, seed=0):
    """Laws of 2 to 40 tokens from flat to almost certain, near one another and far apart."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        size = rng.integers(2, 40)
        s, t = (rng.dirichlet(np.full(size, 10.0 ** rng.uniform(-1.5, 1))) for _ in "st")
        near = rng.choice([0.0, 0.5, 0.9])
        t = near * s + (1 - near) * t
        s, t = (x + 1e-13 for x in (s, t))
        yield s / s.sum(), t / t.sum()


def made_up_pairs():
    """What breaks formulas: no common head, one certain model, tails that decide, mirror images."""
    for rows in (
        ([1 - 1e-12, 1e-12], [1e-12, 1 - 1e-12]),
        ([0.5, 0.5], [1 - 1e-9, 1e-9]),
        ([0.9, 0.1], [0.5, 0.5]),
        ([0.94, 0.05, 0.01], [0.01, 0.05, 0.94]),
        ([0.6, 1e-8, 0.4 - 1e-8], [1e-8, 0.6, 0.4 - 1e-8]),
        ([0.999, 0.0005, 0.0005], [0.0005, 0.999, 0.0005]),
        ([0.3, 0.3, 0.4], [0.3001, 0.2999, 0.4]),
        ([0.25] * 4, [0.97, 0.01, 0.01, 0.01]),
    ):
        yield tuple(np.array(row) for row in rows)


PAIRS = [*random_pairs(), *made_up_pairs()]


def laws_of_three(steps=60):
    """Every law of three tokens on a grid."""
    for i, j in itertools.product(range(steps + 1), repeat=2):
        if i + j <= steps:
            yield np.array([i, j, steps - i - j]) / steps


def package(s, t, position=1, **options):
    """What the package draws from and its trace, for one pair of laws."""
    rows = []
    for law in (s, t):
        with np.errstate(divide="ignore"):
            logits = np.log(np.asarray(law, dtype=float))
        rows.append(torch.tensor(logits, dtype=torch.float64)[None])
    noise = torch.zeros(1, len(s))
    bounds = {} if options.get("alpha_method") in UNBOUNDED_METHODS else FREE
    config = MixtureConfig(**bounds | options)
    drawn = step(*rows, noise, torch.tensor([position]), config, keep_log_q=True)
    trace = dict(zip(TRACE_FIELDS, drawn.trace[0].tolist(), strict=True))
    return drawn.log_q[0].double().exp().numpy(), trace


# 1. The path


@pytest.mark.parametrize("alpha", [0.05, 0.5, 0.8])
def test_divergences_are_those_of_the_free_energy(alpha):
    """Guards: KL(q||s) = aF' - F, KL(q||t) = -(1 - a)F' - F, F' = E[d], F'' = Var[d]."""
    for s, t in PAIRS:
        q, F = mix(s, t, alpha)
        d = np.log(t) - np.log(s)
        slope = float(q @ d)
        assert kl(q, s) == pytest.approx(alpha * slope - F, abs=1e-9)
        assert kl(q, t) == pytest.approx(-(1 - alpha) * slope - F, abs=1e-9)
        h = 1e-4
        below, above = (mix(s, t, alpha + sign * h)[1] for sign in (-1, 1))
        assert (above - below) / (2 * h) == pytest.approx(slope, rel=1e-4, abs=1e-5)
        bend = (above - 2 * F + below) / h**2
        assert bend == pytest.approx(float(q @ (d - slope) ** 2), rel=1e-3, abs=1e-4)


def test_compensation_identity_of_the_geometric_mixture():
    """Guards: (1 - a)KL(p||s) + a KL(p||t) = KL(p||q) - F, from which minimality follows."""
    rng = np.random.default_rng(1)
    for s, t in PAIRS:
        p = rng.dirichlet(np.full(len(s), 0.5)) + 1e-15
        p /= p.sum()
        for alpha in (0.1, 0.5, 0.9):
            q, F = mix(s, t, alpha)
            left = (1 - alpha) * kl(p, s) + alpha * kl(p, t)
            assert left == pytest.approx(kl(p, q) - F, abs=1e-9)


def test_divergences_move_in_opposite_directions():
    """Guards: KL(q||s) grows with alpha and KL(q||t) falls, so a clamped alpha is the best in its
    bounds, and the largest alpha within a trust region is well defined.
    """
    for s, t in PAIRS:
        values = np.array([both_kl(mix(s, t, a)[0], s, t) for a in np.linspace(0.01, 0.99, 30)])
        assert (np.diff(values[:, 0]) >= -1e-12).all()
        assert (np.diff(values[:, 1]) <= 1e-12).all()


# 2. KL symmetry


def test_kl_symmetry_is_the_chernoff_point():
    """Guards: the alpha of equal KLs is where F is least, and both KLs are -F there."""
    for s, t in PAIRS:
        alpha = equal_kl(s, t)
        q, F = mix(s, t, alpha)
        found = minimize_scalar(
            lambda a, pair=(s, t): mix(*pair, a)[1],
            bounds=(0, 1),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert pytest.approx(found.fun, abs=1e-9) == F
        assert both_kl(q, s, t) == pytest.approx((-F, -F), abs=1e-7)
        _, trace = package(s, t)
        at = mix(s, t, trace["alpha"])
        assert at[1] == pytest.approx(F, abs=2e-6)
        assert trace["kl_student"] == pytest.approx(-F, abs=1e-4, rel=1e-4)
        assert trace["kl_teacher"] == pytest.approx(-F, abs=1e-4, rel=1e-4)


def test_kl_symmetry_is_the_minimax_of_all_laws():
    """Guards: a law, geometric mixture or not, that is nearer to both models.

    The grid has laws within its step of q, so an answer that is only good on the path would lose:
    that of alpha = 1/2 does.
    """
    three = [pair for pair in PAIRS if len(pair[0]) == 3]
    three += [tuple(x for x in np.random.default_rng(k).dirichlet([0.7] * 3, 2)) for k in range(6)]
    beaten = 0
    for s, t in three:
        q, F = mix(s, t, equal_kl(s, t))
        half, _ = mix(s, t, 0.5)
        least = min(max(both_kl(p, s, t)) for p in laws_of_three())
        assert least >= max(both_kl(q, s, t)) - 1e-9
        assert least >= -F - 1e-9
        beaten += least < max(both_kl(half, s, t)) - 1e-6
    assert beaten >= 3


def test_certificate_brackets_the_minimax_at_every_alpha():
    """Guards: -F(a) <= minimax <= max KL at a, with a gap of max(a F', -(1 - a) F')."""
    for s, t in PAIRS:
        value = -mix(s, t, equal_kl(s, t))[1]
        for alpha in (0.1, 0.4, 0.5, 0.75):
            q, F = mix(s, t, alpha)
            worst = max(both_kl(q, s, t))
            slope = float(q @ (np.log(t) - np.log(s)))
            assert -F - 1e-9 <= value <= worst + 1e-9
            gap = max(alpha * slope, -(1 - alpha) * slope)
            assert worst + F == pytest.approx(gap, abs=1e-8)


def test_clamped_alpha_is_nearest_to_the_student_at_its_distance_to_the_teacher():
    """Guards: bounds after which q is good for nothing: every q of the path is the law nearest to
    one model among those as near to the other; and bounds after which the KLs are still equal.
    """
    s, t = np.array([0.2, 0.35, 0.45]), np.array([0.9, 0.07, 0.03])
    free = equal_kl(s, t)
    assert free < 0.5
    q, trace = package(s, t, alpha_min=0.7)
    assert (trace["alpha"], trace["clamped"]) == (pytest.approx(0.7), 1.0)
    to_student, to_teacher = both_kl(q, s, t)
    assert to_student > to_teacher + 0.1
    rivals = [p for p in laws_of_three(200) if kl(p, t) <= to_teacher]
    assert len(rivals) > 50
    assert min(kl(p, s) for p in rivals) >= to_student - 1e-6
    inside = [max(both_kl(mix(s, t, a)[0], s, t)) for a in np.linspace(0.7, 0.999, 50)]
    assert min(inside) >= to_student - 1e-6


def test_trust_region_is_nearest_to_the_teacher_in_the_ball():
    """Guards: another law within the trust region that is nearer to the teacher."""
    s, t = np.array([0.2, 0.35, 0.45]), np.array([0.9, 0.07, 0.03])
    q, trace = package(s, t, alpha_method="trust_region", trust_region=0.2)
    assert 0 < trace["alpha"] < 1
    assert kl(q, s) == pytest.approx(0.2, abs=1e-5)
    rivals = [p for p in laws_of_three(200) if kl(p, s) <= 0.2]
    assert min(kl(p, t) for p in rivals) >= kl(q, t) - 1e-5


def test_kl_symmetry_where_the_supports_differ():
    """Guards: the root looked for where F' has one sign on the common support: then the minimax is
    one of the models restricted to it, and the KLs are not equal.
    """
    s, t = np.array([0.1, 0.2, 0.7, 0.0]), np.array([0.6, 0.3, 0.0, 0.1])
    q, trace = package(s, t)
    assert q == pytest.approx([1 / 3, 2 / 3, 0, 0], abs=1e-5)
    assert trace["kl_student"] == pytest.approx(-math.log(0.3), abs=1e-5)
    assert trace["kl_teacher"] < 0.4
    finite = [np.array([x, 1 - x, 0, 0]) for x in np.linspace(0, 1, 401)]
    assert min(max(both_kl(p, s, t)) for p in finite) >= trace["kl_student"] - 1e-5
    has_root = np.array([0.1, 0.4, 0.5, 0]), np.array([0.6, 0.2, 0.0, 0.2])
    q, trace = package(*has_root)
    assert trace["kl_student"] == pytest.approx(trace["kl_teacher"], abs=1e-5)
    assert q[2:].tolist() == [0, 0]


def test_disjoint_supports_and_a_forced_token_give_the_teacher():
    """Guards: a symmetry that is claimed for tokens that have none."""
    s, t = np.array([0.4, 0.6, 0, 0]), np.array([0, 0, 0.3, 0.7])
    q, trace = package(s, t)
    assert q == pytest.approx(t)
    assert (trace["fallback"], trace["kl_student"], trace["kl_teacher"]) == (1.0, INF, 0.0)
    s, t = np.array([0.4, 0.6]), np.array([0.8, 0.2])
    q, trace = package(s, t, position=0, force_first_token=True)
    assert q == pytest.approx(t)
    assert trace["kl_student"] == pytest.approx(kl(t, s), abs=1e-6)
    assert (trace["alpha"], trace["clamped"], trace["kl_teacher"]) == (1.0, 0.0, 0.0)


def test_q_is_the_optimum_of_regularised_reward():
    """Guards: q as the law of largest E_p[d] - KL(p||s) / a: some law of the grid is larger."""
    s, t = np.array([0.2, 0.35, 0.45]), np.array([0.9, 0.07, 0.03])
    d = np.log(t) - np.log(s)
    for alpha in (0.2, 0.5, 0.9):
        q, F = mix(s, t, alpha)
        best = float(q @ d) - kl(q, s) / alpha
        assert best == pytest.approx(F / alpha, abs=1e-12)
        assert max(float(p @ d) - kl(p, s) / alpha for p in laws_of_three()) <= best


# 3. Which way alpha leans


def test_two_tokens_lean_to_the_flatter_model():
    """Guards: the claim for two tokens, on all pairs of a grid; and that alpha = 1/2 needs equal
    entropies there.
    """
    odds = np.linspace(-9, 9, 25)
    for a, b in itertools.product(odds, odds):
        if abs(a - b) < 1e-9:
            continue
        s, t = (np.array([1 / (1 + math.exp(-x)), 1 / (1 + math.exp(x))]) for x in (a, b))
        lean = equal_kl(s, t) - 0.5
        if abs(abs(a) - abs(b)) < 1e-9:
            assert lean == pytest.approx(0, abs=1e-7)
        else:
            assert (lean < 0) == (entropy(s) > entropy(t))


def test_three_tokens_can_lean_to_the_sharper_model():
    """Guards: the claim for two tokens taken for one about vocabularies."""
    s, t = np.array([0.03, 0.04, 0.93]), np.array([0.42, 0.57, 0.01])
    assert entropy(s) < entropy(t) - 0.4
    assert equal_kl(s, t) == pytest.approx(0.435, abs=5e-4)


def test_alpha_is_undetermined_where_the_models_agree():
    """Guards: an alpha that is read as meaning something at F'' = 0. The cost of another alpha is
    KL(q_a||q_b) = F(b) - F(a) - (b - a)F'(a), of the order of F''; and 1e-6 moves alpha.
    """
    for s, t in PAIRS:
        a, b = equal_kl(s, t), 0.5
        q, F = mix(s, t, a)
        other, F_other = mix(s, t, b)
        slope = float(q @ (np.log(t) - np.log(s)))
        assert kl(q, other) == pytest.approx(F_other - F - (b - a) * slope, abs=1e-9)
    s = np.array([0.2, 0.3, 0.5])
    nudges = [np.array([1e-6, -1e-6, 0]), np.array([-1e-6, 2e-6, -1e-6]) / 2]
    alphas = [equal_kl(s, s + nudge) for nudge in nudges]
    assert alphas == pytest.approx([0.5, 0.5], abs=1e-3)  # near 1/2 where d is tiny, by symmetry
    tail = np.array([0.2, 0.3, 0.5 - 1e-9, 1e-9]), np.array([0.2, 0.3, 0.5 - 1e-6, 1e-6])
    q, F = mix(*tail, equal_kl(*tail))
    assert abs(equal_kl(*tail) - 0.5) > 0.05
    assert -F < 1e-6


# 4. ESS balance


def ess(q, p):
    return 1 / float((q * q / p).sum())


def test_ess_balance_is_one_half():
    """Guards: the claim, searched from both ESS themselves; and any other root."""
    for s, t in PAIRS:

        def lead(alpha, s=s, t=t):
            q, _ = mix(s, t, alpha)
            return math.log((q * q / s).sum()) - math.log((q * q / t).sum())

        assert lead(0.5) == pytest.approx(0, abs=1e-9)
        grid = [lead(a) for a in (0.02, 0.2, 0.49, 0.51, 0.8, 0.98)]
        assert max(grid[:3]) < 0 < min(grid[3:])
        _, trace = package(s, t, alpha_method="ess_balance")
        assert trace["alpha"] == 0.5
        assert trace["ess_student"] == pytest.approx(trace["ess_teacher"], rel=1e-4, abs=1e-30)


def test_ess_balance_is_not_kl_symmetry():
    """Guards: the claim that they are one method: KLs apart at 1/2, ESS apart at the KL root."""
    s, t = np.array([0.5, 0.5]), np.array([0.99, 0.01])
    alpha = equal_kl(s, t)
    assert alpha == pytest.approx(0.380, abs=1e-3)
    q, _ = mix(s, t, alpha)
    assert ess(q, s) / ess(q, t) > 1.3
    to_student, to_teacher = both_kl(mix(s, t, 0.5)[0], s, t)
    assert to_student > 2 * to_teacher


# 5. Reverse KL symmetry


def test_reverse_kl_symmetry_has_a_closed_form():
    """Guards: the formula, beside a search from KL(s||q) and KL(t||q) themselves."""
    for s, t in PAIRS:
        to_student, to_teacher = kl(t, s), kl(s, t)
        alpha = to_student / (to_student + to_teacher)
        q, _ = mix(s, t, alpha)
        assert kl(s, q) == pytest.approx(kl(t, q), rel=1e-9, abs=1e-12)
        assert equal_kl(s, t, reverse=True) == pytest.approx(alpha, abs=1e-6)
        _, trace = package(s, t, alpha_method="reverse_kl_symmetry")
        assert trace["alpha"] == pytest.approx(alpha, abs=1e-4 if kl(s, t) < 1e-6 else 1e-6)


def test_reverse_kl_symmetry_is_the_best_of_the_path_and_not_of_all_laws():
    """Guards: the minimax of KL symmetry claimed for this one: the mean of both is nearer."""
    s, t = np.array([0.9, 0.09, 0.01]), np.array([0.01, 0.09, 0.9])
    q, _ = mix(s, t, 0.5)
    worst = max(kl(s, q), kl(t, q))
    assert kl(s, q) == pytest.approx(kl(t, q))
    for alpha in np.linspace(0.05, 0.95, 19):
        other, _ = mix(s, t, alpha)
        assert max(kl(s, other), kl(t, other)) >= worst - 1e-12
    mean = (s + t) / 2
    assert max(kl(s, mean), kl(t, mean)) < 0.8 * worst


# 6. Entropy


def test_entropy_has_several_maxima():
    """Guards: a method that climbs from one place: here to 0.6933, and the largest is 0.6966."""
    s, t = np.array([0.55, 0.00001, 0.44999]), np.array([0.0003, 0.57, 0.4297])
    grid = np.linspace(0, 1, 2001)
    heights = np.array([entropy(mix(s, t, a)[0]) for a in grid])
    inner = heights[1:-1]
    tops = 1 + np.flatnonzero((inner > heights[:-2]) & (inner > heights[2:]))
    assert len(tops) == 2
    left, right = heights[tops]
    assert left < right - 0.002
    assert heights[tops[0] : tops[1]].min() < left - 0.5
    q, trace = package(s, t, alpha_method="entropy")
    assert trace["alpha"] == pytest.approx(grid[tops[1]], abs=1e-3)
    assert entropy(q) == pytest.approx(right, abs=1e-6)


# 7. Veto and supports


def test_veto_is_nearest_to_the_student_on_the_plausible_tokens():
    """Guards: KL(p||s) = KL(p||s_S) - log s(S) for p on S, so that s_S is the projection."""
    s, t = np.array([0.5, 0.2, 0.1, 0.2]), np.array([0.3, 0.04, 0.3, 0.36])
    q, trace = package(s, t, alpha_method="veto", veto_min_p=0.5)
    assert q == pytest.approx([0.625, 0, 0.125, 0.25], abs=1e-6)
    assert trace["kl_student"] == pytest.approx(-math.log(0.8), abs=1e-6)
    for p in laws_of_three():
        on_s = np.array([p[0], 0, p[1], p[2]])
        inside = np.array([0.5, 0, 0.1, 0.2]) / 0.8
        assert kl(on_s, s) == pytest.approx(kl(on_s, inside) - math.log(0.8), abs=1e-12)
        assert kl(on_s, s) >= trace["kl_student"] - 1e-6


def test_a_support_cuts_q_and_moves_alpha():
    """Guards: at a fixed alpha, restriction before and after mixing are the same; a solved alpha is
    another one, the restricted KLs are equal and the plain ones differ by log t(S) / s(S).
    """
    s, t = np.array([0.95, 0.01, 0.04]), np.array([0.04, 0.91, 0.05])
    whole, _ = mix(s, t, 0.4)
    cut, _ = package(s, t, alpha_method="fixed", fixed_alpha=0.4, teacher_support_top_p=0.95)
    assert cut == pytest.approx(np.array([0, *whole[1:]]) / whole[1:].sum(), abs=1e-6)
    q, trace = package(s, t, teacher_support_top_p=0.95)
    restricted = trace["kl_student_restricted"], trace["kl_teacher_restricted"]
    assert restricted[0] == pytest.approx(restricted[1], abs=1e-5)
    to_student, to_teacher = both_kl(q, s, t)
    assert to_student - to_teacher == pytest.approx(math.log(0.96 / 0.05), abs=1e-5)


def test_a_plausible_set_is_small():
    """Guards: the bound 1 / (m max p_t) on the size of S, reached by a flat teacher."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        t = rng.dirichlet(np.full(30, 0.3))
        assert (t >= 0.1 * t.max()).sum() <= 1 / (0.1 * t.max())
    flat = np.array([0.25] * 4)
    assert (flat >= flat.max()).sum() == 4


# 8. Mixtures without an alpha


def test_arithmetic_mixture_has_the_identity_of_the_reverse_kl():
    """Guards: a KL(t||p) + (1 - a)KL(s||p) = KL(m||p) + its value at m; TV(m, s) = a TV(t, s)."""
    rng = np.random.default_rng(2)
    for s, t in PAIRS:
        weight = rng.uniform(0.1, 0.9)
        m = weight * t + (1 - weight) * s
        p = rng.dirichlet(np.full(len(s), 0.5)) + 1e-12
        p /= p.sum()
        least = weight * kl(t, m) + (1 - weight) * kl(s, m)
        found = weight * kl(t, p) + (1 - weight) * kl(s, p)
        assert found == pytest.approx(kl(m, p) + least, abs=1e-9)
        assert tv(m, s) == pytest.approx(weight * tv(t, s), abs=1e-12)
        q, _ = package(s, t, alpha_method="arithmetic", arithmetic_weight=weight)
        assert q == pytest.approx(m, abs=1e-6)


def test_interleaved_is_the_law_of_replacing_what_is_implausible():
    """Guards: q = s on S + (1 - s(S)) t beside the enumeration of the two draws; its distance to
    the student; and a KL to the teacher that is not finite.
    """
    for s, t in PAIRS:
        size = min(3, len(s) - 1)
        kept = np.zeros(len(s), dtype=bool)
        kept[np.argsort(-t, kind="stable")[:size]] = True
        expected = np.zeros(len(s))
        for own, other in itertools.product(range(len(s)), repeat=2):
            expected[own if kept[own] else other] += s[own] * t[other]
        q, trace = package(s, t, alpha_method="interleaved", interleaved_top_k=size)
        assert q == pytest.approx(expected, abs=1e-6)
        outside = s[~kept].sum()
        assert trace["vetoed"] == pytest.approx(outside, abs=1e-6)
        assert tv(expected, s) <= outside + 1e-12
        assert kl(expected, t) < INF


# 9. Privileged prompts


def test_privileged_texts_leave_the_mutual_information():
    """Guards: a student that sees no hint fitted to texts that do: the best fit is the mean over
    hints, and what remains is the information between hint and text.
    """
    rng = np.random.default_rng(3)
    s = rng.dirichlet([1.0] * 3)
    hints = np.array([0.2, 0.3, 0.5])
    texts = [mix(s, rng.dirichlet([0.5] * 3) + 1e-9, 0.6)[0] for _ in hints]
    mean = sum(w * q for w, q in zip(hints, texts, strict=True))
    joint = hints[:, None] * np.array(texts)
    information = kl(joint.ravel(), (hints[:, None] * mean).ravel())
    losses = [sum(w * kl(q, p) for w, q in zip(hints, texts, strict=True)) for p in laws_of_three()]
    at_mean = sum(w * kl(q, mean) for w, q in zip(hints, texts, strict=True))
    assert at_mean == pytest.approx(information, abs=1e-12)
    assert min(losses) >= information - 1e-12
    assert information > 0.05


def test_a_hint_seen_by_the_same_model_tilts_it():
    """Guards: q = p(y) p(hint|y)^a / Z for a model that mixes with itself, hint seen."""
    rng = np.random.default_rng(4)
    joint = rng.dirichlet([0.7] * 12).reshape(4, 3)  # texts and hints
    s = joint.sum(1)
    for hint, alpha in itertools.product(range(3), (0.3, 0.7)):
        t = joint[:, hint] / joint[:, hint].sum()
        tilted = s * (joint[:, hint] / s) ** alpha
        assert mix(s, t, alpha)[0] == pytest.approx(tilted / tilted.sum(), abs=1e-12)


# 10. Texts


class Chain:
    """A law of texts of two symbols: `first`, and `then[y]` after y."""

    def __init__(self, first, then):
        self.first = np.array(first)
        self.then = np.array(then)

    @property
    def joint(self):
        return (self.first[:, None] * self.then).ravel()


def by_token(s, t, alpha_of):
    """The law of texts whose every token is drawn from a mixture; its alphas."""
    first_alpha = alpha_of(s.first, t.first)
    alphas = [alpha_of(a, b) for a, b in zip(s.then, t.then, strict=True)]
    then = [mix(a, b, x)[0] for a, b, x in zip(s.then, t.then, alphas, strict=True)]
    return Chain(mix(s.first, t.first, first_alpha)[0], then)


def test_a_product_of_mixtures_is_not_the_mixture_of_texts():
    """Guards: the claim, with numbers for a reader, 1/2 by token and 5/8 by text; and that they
    agree where the normaliser of what follows does not depend on the token.
    """
    s = Chain([0.5, 0.5], [[0.5, 0.5], [0.9, 0.1]])
    t = Chain([0.5, 0.5], [[0.5, 0.5], [0.1, 0.9]])
    token = by_token(s, t, lambda a, b: 0.5)
    text = mix(s.joint, t.joint, 0.5)[0].reshape(2, 2).sum(1)
    assert token.first[0] == pytest.approx(0.5)
    assert text[0] == pytest.approx(0.625)
    to_come = [math.exp(mix(a, b, 0.5)[1]) for a, b in zip(s.then, t.then, strict=True)]
    weights = token.first * to_come
    assert text == pytest.approx(weights / weights.sum())
    level = Chain([0.3, 0.7], [[0.9, 0.1], [0.1, 0.9]]), Chain([0.6, 0.4], [[0.1, 0.9], [0.9, 0.1]])
    half, _ = mix(level[0].joint, level[1].joint, 0.5)
    assert by_token(*level, lambda a, b: 0.5).joint == pytest.approx(half)


def test_symmetry_of_tokens_is_symmetry_of_texts_and_not_their_minimax():
    """Guards: KLs of whole texts that are not equal though those of every token are; and the
    minimax over laws of texts, which is smaller, claimed for them.
    """
    rng = np.random.default_rng(5)
    smaller = 0
    for _ in range(20):
        s, t = (
            Chain(rng.dirichlet([0.5] * 3) + 1e-6, rng.dirichlet([0.5] * 3, 3) + 1e-6) for _ in "st"
        )
        for chain in (s, t):
            chain.first /= chain.first.sum()
            chain.then /= chain.then.sum(1, keepdims=True)
        token = by_token(s, t, equal_kl).joint
        to_student, to_teacher = both_kl(token, s.joint, t.joint)
        assert to_student == pytest.approx(to_teacher, abs=1e-9)
        least = -mix(s.joint, t.joint, equal_kl(s.joint, t.joint))[1]
        assert least <= to_student + 1e-12
        smaller += least < to_student - 1e-3
    assert smaller >= 10


# 11. Temperature


def test_temperature_before_mixing_is_temperature_of_q_at_a_fixed_alpha():
    """Guards: the claim at a fixed alpha, and its use for a solved one, which moves."""
    moved = 0
    for s, t in PAIRS[:30]:
        cold = [x ** (1 / 0.5) / (x ** (1 / 0.5)).sum() for x in (s, t)]
        q, _ = mix(s, t, 0.3)
        assert mix(*cold, 0.3)[0] == pytest.approx(q**2 / (q**2).sum(), abs=1e-12)
        moved += abs(equal_kl(*cold) - equal_kl(s, t)) > 0.01
    assert moved > 15


def test_a_cold_kl_symmetry_is_not_greedy():
    """Guards: T -> 0 taken for --top-k 1. Where the favourites differ, two tokens stay, or one that
    is the favourite of neither.
    """
    s, t = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.7, 0.1])
    q, _ = package(s, t, temperature=0.02)
    assert q[:2] == pytest.approx([0.5, 0.5], abs=1e-3)
    between = np.array([0.55, 0.01, 0.44]), np.array([0.01, 0.55, 0.44])
    q, _ = package(*between, temperature=0.02)
    assert q[2] > 0.99
    q, _ = package(s, t, temperature=0.02, alpha_min=0.6)
    assert q[1] > 0.999


# 12. Shared Gumbel noise


def agreement(p, q):
    """P(argmax(log p + g) = argmax(log q + g)): sum over y of 1 / sum_z max(p_z/p_y, q_z/q_y)."""
    ratios = np.maximum(p / p[:, None], q / q[:, None])
    return float((1 / ratios.sum(1)).sum())


def test_drafts_agree_as_often_as_the_formula_says():
    """Guards: the acceptance formula, beside 200,000 draws with the package's own noise."""
    s, t = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.1, 0.3, 0.2, 0.4])
    draws = 200_000
    position = torch.arange(draws)
    noise = gumbel(keys_tensor([5]).expand(draws), position, 4)
    rows = [torch.tensor(np.log(x), dtype=torch.float32).expand(draws, -1) for x in (s, t)]
    mixture = MixtureConfig(**FREE)
    tokens = step(*rows, noise, position, mixture).token
    accepted = (draft(rows[0], noise, mixture) == tokens).double().mean().item()
    expected = agreement(s, mix(s, t, equal_kl(s, t))[0])
    assert accepted == pytest.approx(expected, abs=0.004)  # 4 standard errors
    assert abs(expected - agreement(s, t)) > 0.05


def test_drafts_are_accepted_more_often_for_q_than_for_the_teacher():
    """Guards: acceptance that does not fall with alpha, and its bounds by the total variation."""
    for s, t in PAIRS:
        alphas = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
        shares = [agreement(s, mix(s, t, alpha)[0]) for alpha in alphas]
        assert (np.diff(shares) <= 1e-12).all()
        for alpha, share in zip(alphas, shares, strict=True):
            distance = tv(s, mix(s, t, alpha)[0])
            assert (1 - distance) / (1 + distance) - 1e-9 <= share <= 1 - distance + 1e-9


# 13. Lists of likely tokens


def sums(s, t, alpha):
    """Z of a part of the vocabulary, and Z'."""
    terms = s ** (1 - alpha) * t**alpha
    return float(terms.sum()), float((terms * np.log(t / s)).sum())


def list_pairs(seed=6):
    """Pairs whose lists leave little or much out, and one token that both leave out."""
    rng = np.random.default_rng(seed)
    for flat, _ in itertools.product((0.05, 0.3, 2.0), range(8)):
        base, other = rng.dirichlet(np.full(200, flat), 2) + 1e-12
        yield base / base.sum(), (0.7 * base + 0.3 * other) / (0.7 * base + 0.3 * other).sum()
        yield base / base.sum(), other / other.sum()
    hidden = np.full((2, 200), 1e-9)
    hidden[0, :3], hidden[1, 3:6], hidden[:, 6] = 0.25, 0.25, 0.2
    yield tuple(hidden / hidden.sum(1, keepdims=True))


def test_mass_outside_of_lists_is_bounded_at_a_fixed_alpha():
    """Guards: Hoelder's bound of the mass of q that lists do not show, and that it is reached."""
    closest = INF
    for s, t in list_pairs():
        listed = np.union1d(np.argsort(-s)[:3], np.argsort(-t)[:3])
        inside = np.isin(np.arange(200), listed)
        for alpha in (0.2, 0.5, 0.8):
            bound = s[~inside].sum() ** (1 - alpha) * t[~inside].sum() ** alpha
            bound /= bound + sums(s[inside], t[inside], alpha)[0]
            outside = mix(s, t, alpha)[0][~inside].sum()
            assert outside <= bound + 1e-12
            closest = min(closest, bound - outside)
    assert closest < 1e-6


def test_lists_bound_the_solved_alpha():
    """Guards: the interval of alpha that two lists leave, without which the error has no bound."""
    narrow = 0
    grid = np.linspace(0.001, 0.999, 999)
    for s, t in list_pairs():
        listed = np.union1d(np.argsort(-s)[:40], np.argsort(-t)[:40])
        inside = np.isin(np.arange(200), listed)
        lost_s, lost_t = s[~inside].sum(), t[~inside].sum()
        slopes = np.array([sums(s[inside], t[inside], a)[1] for a in grid])
        low = grid[slopes < -lost_t / (1 - grid)].max(initial=0.0)
        high = grid[slopes > lost_s / grid].min(initial=1.0)
        assert low <= equal_kl(s, t) <= high
        narrow += high - low < 0.1
    assert narrow > 5


def test_total_variation_grows_along_the_path():
    """Guards: an end of the interval of alpha that is not the furthest law in it."""
    for s, t in PAIRS:
        laws = [mix(s, t, alpha)[0] for alpha in np.linspace(0.02, 0.98, 13)]
        for start in (0, 6):
            distances = [tv(laws[start], law) for law in laws[start:]]
            assert (np.diff(distances) >= -1e-12).all()


# 14. Claims of earlier documents that are false


def test_both_divergences_have_no_common_minimum():
    """Guards: "minimises both KL divergences": each has its minimum, 0, at its own model."""
    s, t = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    q, _ = mix(s, t, equal_kl(s, t))
    assert kl(q, s) > kl(s, s) == 0
    assert kl(q, t) > kl(t, t) == 0


def test_symmetry_bounds_no_divergence():
    """Guards: "not too far from either model": equal KLs of 20 nats."""
    s, t = np.array([1 - 1e-18, 1e-18]), np.array([1e-18, 1.0])
    _, trace = package(s, t)
    assert trace["kl_student"] == pytest.approx(trace["kl_teacher"], rel=1e-5)
    assert trace["kl_student"] > 20


def test_a_stable_alpha_is_no_agreement():
    """Guards: "stable alpha: consistent model agreement": mirror images have 1/2 always."""
    for tail in (0.4, 0.1, 1e-3, 1e-6):
        s, t = np.array([1 - tail, tail]), np.array([tail, 1 - tail])
        assert equal_kl(s, t) == pytest.approx(0.5, abs=1e-9)


def test_a_support_can_lower_alpha_and_bounds_no_divergence():
    """Guards: "a strict constraint brings alpha closer to 1", and a nucleus as a trust region."""
    s, t = np.array([0.95, 0.01, 0.04]), np.array([0.04, 0.91, 0.05])
    free = package(s, t)[1]
    cut = package(s, t, teacher_support_top_p=0.95)[1]
    assert free["alpha"] == pytest.approx(0.545, abs=1e-3)
    assert cut["alpha"] == pytest.approx(0.455, abs=1e-3)
    assert cut["kl_student"] > -math.log(0.05)  # nothing keeps it from being any number
    assert cut["kl_student"] > free["kl_student"] + 2


def test_no_constant_times_the_uncovered_mass_bounds_the_error_of_lists():
    """Guards: "error O((1 - covered) log V)": the uncovered mass goes to 0 and the error to 1."""
    for uncovered in (1e-1, 1e-2, 1e-3):
        tiny = uncovered**4
        s = np.array([1 - uncovered - tiny, tiny, uncovered])
        t = np.array([tiny, 1 - uncovered - tiny, uncovered])
        listed = np.argmax(s), np.argmax(t)  # both lists of one token, whose log p both models give
        q, _ = mix(s, t, equal_kl(s, t))
        part, _ = mix(*(x[list(listed)] / x[list(listed)].sum() for x in (s, t)), 0.5)
        error = tv(q, np.array([*part, 0.0]))
        assert error == pytest.approx(q[2])
        assert error > 0.3 if uncovered == 1e-1 else error > 0.9
        assert uncovered * math.log(3) < 0.11


def test_an_epsilon_is_no_unknown_probability():
    """Guards: log(p + 1e-10) for what a list does not have: what both find likely is lost."""
    s, t = np.array([0.6, 0.0, 0.4]), np.array([0.0, 0.7, 0.3])
    s, t = (x + 1e-15 for x in (s, t))
    exact, _ = mix(s / s.sum(), t / t.sum(), 0.5)
    heads = np.array([0.6, 1e-10, 1e-10]), np.array([1e-10, 0.7, 1e-10])
    lists, _ = mix(*(x / x.sum() for x in heads), 0.5)
    assert exact[2] > 0.99
    assert lists[2] < 1e-4


def test_no_geometric_mixture_covers_modes():
    """Guards: "mode-covering" of reverse KL symmetry: what one model lacks, q lacks."""
    s, t = np.array([0.5, 0.0, 0.5]), np.array([0.0, 0.5, 0.5])
    q, _ = package(s, t, alpha_method="reverse_kl_symmetry")
    assert q == pytest.approx([0, 0, 1])
    mean, _ = package(s, t, alpha_method="arithmetic", arithmetic_weight=0.5)
    assert mean == pytest.approx([0.25, 0.25, 0.5])


def test_ten_to_fifteen_bisections_do_not_reach_a_millionth():
    """Guards: "converges in 10-15 iterations to 1e-6", counted on laws whose F'' is ordinary."""
    counts = []
    for s, t in PAIRS:
        d = np.log(t) - np.log(s)
        at_root, _ = mix(s, t, equal_kl(s, t))
        if not 0.5 < float(at_root @ (d - at_root @ d) ** 2) < 2:
            continue
        low, high, count = 0.0, 1.0, 0
        while True:
            middle = (low + high) / 2
            slope = float(mix(s, t, middle)[0] @ d)
            count += 1
            if abs(slope) <= 1e-6:
                break
            low, high = (middle, high) if slope < 0 else (low, middle)
        counts.append(count)
    assert len(counts) > 5
    assert np.median(counts) > 17


# The page and this file


def test_the_page_names_these_tests():
    """Guards: a claim whose test was renamed, and a test that no claim has."""
    page = (ROOT / "docs/theory.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("**/test_*.py"))
    sources += (ROOT / "tests/engines/conformance.py").read_text()
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []
    own = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.MULTILINE))
    assert own - named == {"test_the_page_names_these_tests"}
