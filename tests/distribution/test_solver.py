"""The root of F': residual, certificate and the promised number of passes, on inputs made to break
it.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import make_pair
from optimal_sampling.distribution.cpu.tiled import TiledPair
from optimal_sampling.distribution.solver import (
    ABOVE,
    BELOW,
    MAX_PASSES,
    TOLERANCE,
    solve_kl_symmetry,
)


@np.errstate(all="ignore")
def solve(student, teacher, low=0.5, high=1.0):
    """The pair, the alphas, the evaluations made and, per row, those in which its alpha was new."""
    pair = make_pair(student, teacher, MixtureConfig())
    alphas = [np.full(len(student), np.nan)]
    moments = pair.moments

    def counting(alpha):
        alphas.append(np.float32(alpha))
        return moments(alpha)

    pair.moments = counting
    alpha = solve_kl_symmetry(pair, low, high)
    pair.moments = moments
    evaluated = sum(a != b for a, b in itertools.pairwise(alphas))
    return pair, alpha, len(alphas) - 1, evaluated


def passes(calls):
    """The first four passes hold one alpha (two bounds at most in the first), the others a fan of
    33.
    """
    return min(calls, 4) + round(max(calls - 4, 0) / 33)


@np.errstate(all="ignore")
def check(student, teacher, low, high):
    pair, alpha, calls, _ = solve(student, teacher, low, high)
    assert passes(calls) <= MAX_PASSES
    inside = (alpha >= low - 1e-7) & (alpha <= high + 1e-7)
    assert (inside | (alpha == BELOW) | (alpha == ABOVE)).all()
    at = pair.moments(np.where(inside, alpha, np.where(alpha == BELOW, low, high)))
    step = TOLERANCE * np.maximum(1, at.curvature)
    left = pair.moments(np.clip(at.alpha - 1.1 * TOLERANCE, 2**-24, 1))
    right = pair.moments(np.clip(at.alpha + 1.1 * TOLERANCE, 0, 1 - 2**-24))
    crossed = (left.slope <= step) & (right.slope >= -step)
    ends = (at.alpha <= low + 2e-6) & (at.slope > 0) | (at.alpha >= high - 2e-6) & (at.slope < 0)
    assert (~inside | (np.abs(at.slope) <= step) | crossed | ends).all()
    assert (at.slope[alpha == BELOW] > 0).all()
    assert (at.slope[alpha == ABOVE] < 0).all()
    return alpha


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_input_is_solved_in_eight_passes(data):
    """Guards: Newton steps that leave the bracket, a staircase F' that no derivative describes, and
    slow bisection.
    """
    rows, vocab = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 24))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    scale = 10.0 ** rng.uniform(-4, 4, (2, rows, 1))
    student = rng.standard_normal((rows, vocab)) * scale[0]
    teacher = (
        student * rng.choice([0.0, 0.3, 1.0, -1.0]) + rng.standard_normal((rows, vocab)) * scale[1]
    )
    holes = rng.random((2, rows, vocab)) < rng.choice([0.0, 0.2])
    student, teacher = np.where(holes[0], -np.inf, student), np.where(holes[1], -np.inf, teacher)
    student[:, 0], teacher[:, 0] = 0.0, rng.uniform(-50, 0)
    low, high = data.draw(
        st.sampled_from([(0.5, 1.0), (0.0, 1.0), (0.0, 0.5), (0.2, 0.7), (0.5, 0.5)])
    )
    check(
        torch.tensor(student, dtype=torch.float32),
        torch.tensor(teacher, dtype=torch.float32),
        low,
        high,
    )


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 1.0, 50.0, 400.0, 1e4])
def test_two_near_disjoint_tokens(gap):
    """Guards: underflow between two models that agree on nothing, and loss of digits where they
    agree on all.
    """
    student, teacher = torch.tensor([[gap, 0.0, -gap]]), torch.tensor([[0.0, gap, -gap]])
    assert abs(check(student, teacher, 0.0, 1.0)[0] - 0.5) < (1e-2 if gap < 1e-3 else 1e-5)


def test_staircase():
    """Guards: derivatives that say nothing. F is a polygon, so F' jumps between constants."""
    slopes = np.linspace(-3e4, 3e4, 61)
    kinks = np.linspace(0.013, 0.987, 60)
    values = -np.concatenate([[0.0], np.cumsum(np.diff(slopes) * kinks)])
    student = torch.tensor(values - values.max(), dtype=torch.float32)[None]
    teacher = torch.tensor(values + slopes - (values + slopes).max(), dtype=torch.float32)[None]
    check(student, teacher, 0.0, 1.0)


def test_clamped_token_costs_one_pass_and_typical_ones_three():
    """Guards: work spent on the root of a token whose F' at the bound already says that it is
    clamped.
    """
    g = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(256, 272, generator=g)
    teacher = student * 1.2 + torch.randn(256, 272, generator=g)
    _, alpha, _, evaluated = solve(student, teacher)
    assert (alpha == BELOW).any()
    assert (evaluated[alpha == BELOW] == 1).all()
    assert (alpha > 0).any()
    assert evaluated[alpha > 0].mean() <= 3.5
    assert evaluated.max() <= 4


def test_converged_rows_stay_frozen():
    """Guards: a converged row whose sub-ulp steps leave the bracket, so that it bisects away while
    others go on.
    """
    g = torch.Generator().manual_seed(1)
    student = torch.randn(64, 50, generator=g) * torch.logspace(-3, 2, 64)[:, None]
    teacher = torch.randn(64, 50, generator=g) * torch.logspace(2, -3, 64)[:, None]
    together = solve(student, teacher, 0.0, 1.0)[1]
    alone = np.concatenate(
        [solve(student[i : i + 1], teacher[i : i + 1], 0.0, 1.0)[1] for i in range(64)]
    )
    assert (together == alone).all()


def test_large_vocabulary():
    """Guards: sums of 262,144 terms that lose the sixth digit, and tiles added up wrongly."""
    g = torch.Generator().manual_seed(2)
    student = 4 * torch.randn(2, 262_144, generator=g)
    teacher = student * 0.7 + torch.randn(2, 262_144, generator=g)
    pair, alpha, _, _ = solve(student, teacher)
    s, t = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    q = torch.lerp(s, t, torch.tensor(alpha)[:, None]).softmax(-1)
    assert ((q * (t - s)).sum(-1).abs() < 3e-6).all()
    at = pair.moments(alpha)
    assert np.abs(at.kl_student - at.kl_teacher).max() < 1e-6
    assert np.abs(at.kl_student + at.F).max() < 1e-6


@np.errstate(all="ignore")
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.8])
def test_partitions_of_far_models(alpha):
    """Guards: sums for the ESS that overflow or vanish in float32, alone or beside a row where they
    do not.
    """
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4, 5000, generator=g) * torch.tensor([1.0, 20.0, 60.0, 200.0])[:, None]
    pair = TiledPair(*logits, MixtureConfig())
    got = np.log(pair.ess(pair.moments(pair.full(alpha))))
    s, t = logits.double().log_softmax(-1)
    exact = float(np.float32(alpha))

    def partition(beta):
        return torch.logsumexp((1 - beta) * s + beta * t, -1).numpy()

    want = [2 * partition(exact) - partition(2 * exact - k) for k in (0, 1)]
    near = np.array(want) > -600  # no float64 holds less
    assert near[:, :2].all()
    np.testing.assert_allclose(got[near], np.array(want)[near], rtol=1e-5, atol=1e-5)
    alone = TiledPair(*logits[:, :1], MixtureConfig())
    assert (np.log(alone.ess(alone.moments(alone.full(alpha))))[:, 0] == got[:, 0]).all()
