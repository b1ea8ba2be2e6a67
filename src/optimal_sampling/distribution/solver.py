"""The alpha at which KL(q||p_student) = KL(q||p_teacher): the root of F' in a few passes.

F is convex, so F' grows. Every pass gives F', F'' and F''' at one alpha per row; the next alpha is
the root of the parabola they make (its error shrinks cubically), or half of the bracket where that
leaves it. That takes two to four passes on real rows; a row that is not done then gets a fan of
alphas in every pass, which cuts its bracket by 33 each time: no input takes more than MAX_PASSES.

Solved means |F'| <= 1e-6 max(1, F''): the two KLs agree to 1e-6 nats, or alpha is the root to 1e-6
(a Newton step is F' / F''); or the bracket has shrunk to 1e-6. Float32 carries little more: with
d = +-50, neighbouring alphas are 1.5e-4 nats apart.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optimal_sampling.distribution.arrays import Array, at_least
from optimal_sampling.distribution.pair import Moments, Pair

__all__ = ["ABOVE", "BELOW", "MAX_PASSES", "TOLERANCE", "solve_kl_symmetry"]

TOLERANCE = 1e-6
MAX_PASSES = 8
BELOW, ABOVE = -1.0, 2.0
"""Returned for a root of which no more is known than beyond which bound it lies."""

_SINGLE = 4  # passes with one alpha each; then come fans
_FAN = 32  # 33^4 > 1e6: four fans shrink any bracket to the tolerance


class _Bracket:
    """Where the roots of all rows lie, and which are found. F' < 0 at alpha = 0 and > 0 at 1."""

    def __init__(self, pair: Pair, low: float, high: float) -> None:
        self.xp = pair.xp
        self.low = low
        self.high = high
        self.left = pair.full(low)
        self.right = pair.full(high)
        self.alpha = self.left
        self.done = self.solved = pair.bad & False

    def update(self, at: Moments) -> None:
        """Take in one evaluation.

        A bracket shrinks to nothing where the root lies beyond a bound.
        """
        xp = self.xp
        rising = at.slope >= 0
        left = xp.where(rising, self.low, at.alpha)
        right = xp.where(rising, at.alpha, self.high)
        self.left = xp.maximum(self.left, left)
        self.right = xp.minimum(self.right, right)
        limit = TOLERANCE * at_least(at.curvature, 1.0)
        self.solved = xp.abs(at.slope) <= limit
        narrow = self.right - self.left <= TOLERANCE
        self.done = self.done | self.solved | narrow
        self.at = at
        self.alpha = at.alpha

    def hold(self, alpha: Array) -> Array:
        """`alpha`, but rows that are done keep theirs: another step would be rounding noise."""
        return self.xp.where(self.done, self.alpha, alpha)

    def next(self) -> Array:
        """The likeliest root. Never an end: 0 and 1 are no mixtures."""
        xp = self.xp
        at = self.at
        left = self.left
        right = self.right
        squared = at.curvature * at.curvature - 2 * at.slope * at.third
        root = xp.sqrt(at_least(squared, 0.0))
        guess = at.alpha - 2 * at.slope / (at.curvature + root)
        inside = (guess > left) & (guess < right)
        guess = xp.where(inside, guess, (left + right) / 2)
        guess = xp.maximum(guess, left + TOLERANCE / 2)
        guess = xp.minimum(guess, right - TOLERANCE / 2)
        return self.hold(guess)

    def fan(self) -> Iterator[Array]:
        """The likeliest root, and alphas that cut the bracket into equal parts."""
        left = self.left
        width = self.right - left
        yield self.next()
        for i in range(1, _FAN + 1):
            yield self.hold(left + width * (i / (_FAN + 1)))

    def result(self) -> Array:
        """The alphas found."""
        xp = self.xp
        alpha = self.alpha
        slope = self.at.slope
        below = (alpha <= self.low) & (slope > 0) & ~self.solved
        above = (alpha >= self.high) & (slope < 0) & ~self.solved
        return xp.where(below, BELOW, xp.where(above, ABOVE, alpha))


def solve_kl_symmetry(pair: Pair, low: float, high: float) -> Array:
    """The root of F' in [low, high], to float32; BELOW or ABOVE where it lies outside.

    A pass evaluates one alpha per row, or in a fan _FAN + 1. On an accelerator the host looks at
    the result once.
    """
    low = float(np.float32(low))
    high = float(np.float32(high))
    bracket = _Bracket(pair, low, high)
    bounds = [bound for bound in (low, high) if 0 < bound < 1]
    for bound in bounds or [(low + high) / 2]:
        alpha = bracket.hold(pair.full(bound))
        bracket.update(pair.moments(alpha))
    for number in range(1, MAX_PASSES):
        looks = pair.on_cpu or number == _SINGLE
        if looks and bracket.done.all():
            break
        alphas = [bracket.next()] if number < _SINGLE else bracket.fan()
        for alpha in alphas:
            bracket.update(pair.moments(alpha))
    return bracket.result()
