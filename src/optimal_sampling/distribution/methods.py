"""How alpha is chosen: one function per method, from a pair of models to the free alpha of a row.

CONTRIBUTING.md says how to add one. A method need not know the bounds. Where it finds that its
alpha lies beyond one, any value beyond it will do.
"""

from __future__ import annotations

from collections.abc import Callable

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import (
    Array,
    Flags,
    Namespace,
    Positions,
    array_of,
    at_least,
    at_most,
)
from optimal_sampling.distribution.pair import Pair
from optimal_sampling.distribution.solver import solve_kl_symmetry

__all__ = ["METHODS", "Method"]

Method = Callable[[Pair, Positions, MixtureConfig], Array]

METHODS: dict[str, Method] = {}

_GRID = 20
_FLAT = 1e-9  # nats; three entropies that differ by less are equal up to rounding
_NEAREST_ONE = 1 - 2.0**-24  # largest float32 below 1


def _register(method: Method) -> Method:
    METHODS[method.__name__] = method
    return method


@_register
def kl_symmetry(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """KL(q||p_student) = KL(q||p_teacher): the minimax point."""
    return solve_kl_symmetry(pair, mixture.alpha_min, mixture.alpha_max)


@_register
def mirror(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """1 - alpha of kl_symmetry: leans to the surer model."""
    return 1 - solve_kl_symmetry(pair, 1 - mixture.alpha_max, 1 - mixture.alpha_min)


@_register
def reverse_kl_symmetry(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """KL(p_student||q) = KL(p_teacher||q): alpha = KL(t||s) / (KL(s||t) + KL(t||s)).

    1/2 for inf / inf and 0 / 0.
    """
    xp = pair.xp
    infinite = pair.full(float("inf"))
    at_teacher = pair.moments(pair.full(1.0))
    to_student = at_least(at_teacher.slope, 0.0)
    to_student = xp.where(pair.student_misses, infinite, to_student)
    at_student = pair.moments(pair.full(0.0))
    to_teacher = at_least(-at_student.slope, 0.0)
    to_teacher = xp.where(pair.teacher_misses, infinite, to_teacher)
    alpha = 1 / (1 + to_teacher / to_student)
    return xp.where(xp.isnan(alpha), 0.5, alpha)


@_register
def ess_balance(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """sum q^2/p_student = sum q^2/p_teacher, that is F(2 alpha) = F(2 alpha - 1).

    1/2 on a common support. Where the supports differ, F is that of the common one and its ends
    are not level: then the root is bisected.
    """
    xp = pair.xp
    half = pair.full(0.5)
    uneven = pair.student_misses | pair.teacher_misses
    if pair.none(uneven):
        return half
    low = pair.full(0.0)
    high = pair.full(1.0)
    for _ in range(24):
        alpha = (low + high) / 2
        ahead, behind = pair.partitions(2 * alpha, 2 * alpha - 1)
        leads = ahead > behind
        low = xp.where(leads, low, alpha)
        high = xp.where(leads, alpha, high)
    root = xp.clip((low + high) / 2, 1 - _NEAREST_ONE, _NEAREST_ONE)
    return xp.where(uneven, root, half)


@_register
def entropy(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """argmax of H(q) over [alpha_min, alpha_max], which can have several maxima.

    The two highest tops of a grid are climbed. A maximum narrower than the grid can be missed.
    """
    xp = pair.xp
    low = mixture.alpha_min
    high = mixture.alpha_max
    width = (high - low) / _GRID
    grid = [pair.full(low + width * i) for i in range(_GRID + 1)]
    heights = [pair.moments(alpha).entropy for alpha in grid]
    (first, height), (second, below) = _two_tops(pair, grid, heights)
    best, height = _climb(pair, (first, height), (low, high))
    has_second = below > -float("inf")
    if pair.none(has_second):
        return best
    other, other_height = _climb(pair, (second, below), (low, high))
    return xp.where(has_second & (other_height > height + _FLAT), other, best)


_Top = tuple[Array, Array]
"""An alpha and the entropy there."""


def _two_tops(pair: Pair, grid: list[Array], heights: list[Array]) -> tuple[_Top, _Top]:
    """The highest two points of a grid that are no lower than their neighbours.

    -inf as the height of a second that is not there.
    """
    xp = pair.xp
    nothing = pair.full(-float("inf"))
    first = second = grid[0], nothing
    for i, (alpha, value) in enumerate(zip(grid, heights, strict=True)):
        before = heights[i - 1] if i else nothing
        after = heights[i + 1] if i + 1 < len(grid) else nothing
        is_top = (value > before) & (value >= after)
        height = xp.where(is_top, value, nothing)
        leads = height > first[1]
        follows = height > second[1]
        second = _chosen(xp, follows, (alpha, height), second)
        second = _chosen(xp, leads, first, second)
        first = _chosen(xp, leads, (alpha, height), first)
    return first, second


def _chosen(xp: Namespace, where: Flags, one: _Top, other: _Top) -> _Top:
    """Per row one of two points."""
    return xp.where(where, one[0], other[0]), xp.where(where, one[1], other[1])


def _climb(pair: Pair, top: _Top, bounds: tuple[float, float]) -> _Top:
    """The maximum around a point of the grid, of ever closer alphas.

    Then the vertex of the parabola through three of them: to compare values finds a maximum only to
    the root of their precision, 1e-4 of alpha and more.
    """
    xp = pair.xp
    low, high = bounds
    best, height = top
    width = (high - low) / _GRID
    for _ in range(3):
        trials = [xp.clip(best + width * part, low, high) for part in (-0.6, -0.3, 0.3, 0.6)]
        width *= 0.4
        for alpha in trials:
            value = pair.moments(alpha).entropy
            better = value > height
            best = xp.where(better, alpha, best)
            height = xp.where(better, value, height)
    width *= 0.4
    middle = xp.clip(best, low + width, high - width)
    around = [middle - width, middle, middle + width]
    before, at, after = (pair.moments(alpha).entropy for alpha in around)
    bend = 2 * at - before - after
    curved = bend > _FLAT
    shift = width / 2 * (after - before) / xp.where(curved, bend, 1.0)
    return xp.where(curved & (abs(shift) <= width), middle + shift, best), height


@_register
def fixed(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """The same alpha at every token."""
    return pair.full(mixture.fixed_alpha)


@_register
def trust_region(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """The largest alpha with KL(q||p_student) <= trust_region: that KL has the slope alpha F''.

    Newton's steps, halved brackets where they leave it and at every fourth; to 1e-6 of alpha or of
    the KL.
    """
    xp = pair.xp
    limit = mixture.trust_region
    low = pair.full(0.0)
    high = pair.full(1.0)
    alpha = high
    done = pair.bad
    for number in range(30):
        at = pair.moments(alpha)
        excess = at.kl_student - limit
        excess = xp.where(pair.student_misses & (alpha == 1), float("inf"), excess)
        fits = excess <= 0
        low = xp.where(~done & fits, at.alpha, low)
        high = xp.where(~done & ~fits, at.alpha, high)
        done = done | (fits & (excess > -1e-6 * limit))
        done = done | (high - low <= 1e-6) | (low == 1)
        if pair.on_cpu and done.all():
            break
        slope = at.alpha * at.curvature
        newton = at.alpha - (excess + 5e-7 * limit) / slope
        inside = (newton > low) & (newton < high) & (number % 4 != 3)
        going = xp.where(inside, newton, (low + high) / 2)
        alpha = xp.where(done, low, going)
    return low


@_register
def schedule(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """Linear in the position, from schedule_start to schedule_end at token schedule_tokens."""
    start = mixture.schedule_start
    share = at_most(array_of(position) / mixture.schedule_tokens, 1.0)
    return start + (mixture.schedule_end - start) * share


@_register
def veto(pair: Pair, position: Positions, mixture: MixtureConfig) -> Array:
    """0: the student, which the pair has restricted to what the teacher finds plausible.

    Of all distributions on these tokens S it is the nearest to p_student, by KL(q||p_student) =
    -log p_student(S).
    """
    return pair.full(0.0)
