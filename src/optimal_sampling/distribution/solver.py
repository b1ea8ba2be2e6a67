"""The alpha at which KL(q||p_student) = KL(q||p_teacher): the root of F' in a few passes over the vocabulary.

F is convex, so F' grows. Every pass tells F, F' and F'' at one alpha per row. The next alpha is the root of a parabola
through what is known of F' at the two ends of the bracket. That takes two to four passes on real rows; a row that is
not done then gets a fan of alphas in every pass, which cuts its bracket by 33 each time: no input takes more than
MAX_PASSES.

Solved means |F'| <= 1e-6 max(1, F''): the two KLs agree to 1e-6 nats, or alpha is the root to 1e-6 (a Newton step is
F' / F''); or the bracket has shrunk to 1e-6. Float32 carries little more: with d = +-50, neighbouring alphas are
1.5e-4 nats apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from optimal_sampling.distribution.pair import Moments, Pair
from optimal_sampling.distribution.tiles import Rows, at_least, stack

__all__ = ["ABOVE", "BELOW", "MAX_PASSES", "TOLERANCE", "solve_kl_symmetry"]

TOLERANCE = 1e-6
MAX_PASSES = 8
BELOW, ABOVE = -1.0, 2.0
"""Returned for a root of which no more is known than that it lies below the lower, or above the upper bound."""

_SINGLE = 4  # passes with one alpha each; then come fans
_FAN = 32  # 33^4 > 1e6: four fans shrink any bracket to the tolerance


class _Bracket:
    """Where the roots of all rows lie, and which are found.

    Each end is a stack of alpha, F, F' and F''. F' is infinite at an end that was never evaluated: only 0 and 1 are
    taken as ends unseen, where F = 0 on a common support.
    """

    def __init__(self, pair: Pair, low: float, high: float) -> None:
        self.xp: Any = pair.xp
        self.low, self.high = low, high
        zero, unknown = pair.full(0.0), pair.full(float("inf"))
        self.left = stack([zero + low, zero, -unknown, zero])
        self.right = stack([zero + high, zero, unknown, zero])
        self.alpha, self.done = zero + low, zero != 0

    def update(self, at: Moments) -> None:
        """Take in one evaluation. A row that is done stays as it is: its next step would be noise."""
        xp, alpha, slope = self.xp, at.alpha, at.slope
        solved = xp.abs(slope) <= TOLERANCE * at_least(at.curvature, 1.0)
        here = stack([alpha, at.F, slope, at.curvature])
        inside = ~self.done & (alpha >= self.left[0]) & (alpha <= self.right[0])
        self.left = xp.where(inside & (slope < 0), here, self.left)
        self.right = xp.where(inside & (slope >= 0), here, self.right)
        found = xp.where(solved, alpha, self._nearer_end())
        found = xp.where(~solved & (alpha <= self.low) & (slope > 0), BELOW, found)
        found = xp.where(~solved & (alpha >= self.high) & (slope < 0), ABOVE, found)
        ready = ~self.done & (solved | (self.right[0] - self.left[0] <= TOLERANCE))
        self.alpha = xp.where(ready, found, self.alpha)
        self.done = self.done | ready

    def _nearer_end(self) -> Rows:
        """The end with the smaller |F'|, so one that was evaluated."""
        xp = self.xp
        return xp.where(xp.abs(self.left[2]) <= xp.abs(self.right[2]), self.left[0], self.right[0])

    def next(self) -> Rows:
        """The likeliest root. Rows that are done keep their alpha, so they cost nothing."""
        xp, a, b = self.xp, self.left, self.right
        from_left = xp.abs(a[2]) <= xp.abs(b[2])
        guess = _parabola_root(xp, xp.where(from_left, a, b), xp.where(from_left, b, a))
        kink = (b[1] - a[1] + a[2] * a[0] - b[2] * b[0]) / (a[2] - b[2])  # where the tangents of F meet
        for fallback in (kink, (a[0] + b[0]) / 2):
            guess = xp.where((guess > a[0]) & (guess < b[0]), guess, fallback)
        guess = xp.minimum(
            xp.maximum(guess, a[0] + TOLERANCE / 2), b[0] - TOLERANCE / 2
        )  # never an end: 0 and 1 are no mixtures
        return xp.where(self.done, self._at_rest(), guess)

    def _at_rest(self) -> Rows:
        return self.xp.clip(self.alpha, self.low, self.high)

    def fan(self) -> list[Rows]:
        """Alphas that cut the bracket into equal parts, and the likeliest root."""
        a, width, rest = self.left[0], self.right[0] - self.left[0], self._at_rest()
        parts = [self.xp.where(self.done, rest, a + width * (i / (_FAN + 1))) for i in range(1, _FAN + 1)]
        return [*parts, self.next()]

    def result(self) -> Rows:
        """The alphas found."""
        return self.xp.where(self.done, self.alpha, self._nearer_end())


def _parabola_root(xp: Any, end: Rows, other: Rows) -> Rows:
    """Root of the parabola with F' and F'' of `end` and with F' of `other`; where that is unknown, with its F."""
    h = other[0] - end[0]
    by_slope = (other[2] - end[2] - end[3] * h) / (3 * h * h)
    by_value = (other[1] - end[1] - end[2] * h - end[3] * h * h / 2) / (h * h * h)
    k = xp.where(xp.isfinite(other[2]), by_slope, by_value)
    root = xp.sqrt(at_least(end[3] * end[3] - 12 * k * end[2], 0.0))
    return end[0] - 2 * end[2] / (end[3] + root)


def _first_points(low: float, high: float) -> list[float]:
    """F' < 0 at alpha = 0 and > 0 at alpha = 1 are known, so only inner bounds are evaluated."""
    return [bound for bound in (low, high) if 0 < bound < 1] or [(low + high) / 2]


@torch.no_grad()
@np.errstate(all="ignore")
def solve_kl_symmetry(pair: Pair, low: float, high: float) -> Rows:
    """The root of F' in [low, high], to float32; BELOW or ABOVE where F' at a bound says that it lies outside.

    A pass evaluates one alpha per row, or in a fan _FAN + 1. On an accelerator the host looks at the result once.
    """
    low, high = float(np.float32(low)), float(np.float32(high))
    bracket = _Bracket(pair, low, high)
    points = [pair.full(point) for point in _first_points(low, high)]
    for number in range(1, MAX_PASSES + 1):
        for alpha in points:
            bracket.update(pair.moments(alpha))
        if (pair.on_cpu or number == _SINGLE) and bool(bracket.done.all()):
            break
        points = [bracket.next()] if number < _SINGLE else bracket.fan()
    return bracket.result()
