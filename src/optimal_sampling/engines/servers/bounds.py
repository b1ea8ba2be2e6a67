"""How far q of two lists can be from q of the whole rows: a proven bound on the total variation.

The proof is in docs/servers.md, whose numbers the comments give. Notation there: s and t are the
models, U the union of the lists, w = s^(1-alpha) t^alpha, Z the sum of w, psi = w log(t/s).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float64

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.servers.union import NEVER, Side, Support, Union, log_sum

__all__ = ["Box", "alpha_interval", "box_of", "total_variation_bound"]

_INSIDE = 1e-9  # of alpha: the ends of [0, 1] are no mixtures
_ROUNDING = 1e-13
_TINY = 1e-200  # in place of a sum of weights that is 0
_GRID = 16
_ROUNDS = 4
_PIECES = 16
_SHRINKS = 0.98  # a round that leaves more of the interval is the last

Numbers: TypeAlias = Float64[np.ndarray, " columns"]
Flags: TypeAlias = Bool[np.ndarray, " columns"]
Table: TypeAlias = Float64[np.ndarray, "alphas columns"]
Alphas: TypeAlias = Float64[np.ndarray, " alphas"]
Range: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """All pairs of distributions that have these lists: limits of every id's log s and log t.

    The last column stands for all ids outside of the union together.
    """

    student: Numbers
    """log s, or the most that it can be."""
    teacher: Numbers
    student_known: Flags
    """Where the id has any weight at all, log s is this."""
    teacher_known: Flags
    certain: Flags
    """The id certainly lies in the teacher's support."""
    drawn: Flags
    """q of the lists has the id."""
    guess: tuple[Numbers, Numbers]
    """log s and log t that q of the lists is made from."""
    student_total: Range
    """Bounds on the log of the student's mass in the support."""
    teacher_total: Range

    @property
    def exact(self) -> Flags:
        """Ids whose weight is known."""
        exact: Flags = self.student_known & self.teacher_known & self.certain
        return exact


def box_of(union: Union, support: Support | None) -> Box:
    """What two lists, and the teacher's support where there is one, leave open."""
    student, teacher = union.student, union.teacher
    everywhere = np.ones(len(union.ids), dtype=bool)
    possible = everywhere if support is None else support.possible
    reaches = support is None or support.rest > NEVER
    outside = (student.rest[1], teacher.rest[1] if support is None else support.rest)
    if union.is_whole or not reaches:
        outside = (NEVER, NEVER)
    never = ~possible  # no weight, which is known
    certain = everywhere if support is None else support.certain
    totals = (student.total, teacher.total)
    if support is not None:
        totals = (_student_total(student, support), _teacher_total(teacher, support))
    return Box(
        student=np.append(np.where(possible, student.log_p, NEVER), outside[0]),
        teacher=np.append(np.where(possible, teacher.log_p, NEVER), outside[1]),
        student_known=np.append(student.known | never, False),
        teacher_known=np.append(teacher.known | never, False),
        certain=np.append(certain | never, False),
        drawn=np.append(possible & (teacher.known | (support is None)), False),
        guess=(np.append(student.guess, NEVER), np.append(teacher.guess, NEVER)),
        student_total=totals[0],
        teacher_total=totals[1],
    )


def _student_total(student: Side, support: Support) -> Range:
    low = log_sum(student.log_p[support.certain & student.known])
    high = log_sum(student.log_p[support.possible & student.known])
    unknown = student.log_p[support.possible & ~student.known]
    rest = student.rest[1] if support.rest > NEVER else min(student.rest[1], log_sum(unknown))
    return low, float(np.logaddexp(high, rest))


def _teacher_total(teacher: Side, support: Support) -> Range:
    known = log_sum(teacher.log_p[support.possible & teacher.known])
    return support.least_mass, float(np.logaddexp(known, support.rest))


# Weights


def _weights(student: Numbers, teacher: Numbers, alphas: Alphas) -> Table:
    column = alphas[:, None]
    weights: Table = np.exp((1 - column) * student + column * teacher)
    return weights


def _psi(student: Numbers | Table, teacher: Numbers | Table, alphas: Alphas) -> Table:
    """s^(1-alpha) t^alpha log(t/s)."""
    column = alphas[:, None]
    psi: Table = np.exp((1 - column) * student + column * teacher) * (teacher - student)
    return psi


def _slope_limits(box: Box, teacher: Numbers, alphas: Alphas) -> tuple[Table, Table]:
    """Least and most of psi of every column, for alphas inside of (0, 1); lemma 2."""
    column = alphas[:, None]
    at_most = _psi(box.student, teacher, alphas)
    lowest = _psi(box.student, np.minimum(teacher, box.student - 1 / column), alphas)
    highest = _psi(np.minimum(box.student, teacher - 1 / (1 - column)), teacher, alphas)
    least = np.where(box.teacher_known, np.minimum(at_most, 0.0), lowest)
    most = np.where(box.student_known, np.maximum(at_most, 0.0), highest)
    return np.where(box.exact, at_most, least), np.where(box.exact, at_most, most)


# alpha


def alpha_interval(box: Box, mixture: MixtureConfig, position: int) -> Range:
    """Where alpha of the exact q lies; of the whole rows, by the method of the mixture."""
    method = mixture.alpha_method
    low, high = (mixture.alpha_min, mixture.alpha_max) if mixture.has_bounds else (0.0, 1.0)
    if mixture.force_first_token and position == 0:
        return 1.0, 1.0
    if method == "veto":
        return 0.0, 0.0
    known = _known_alpha(mixture, position)
    if known is not None:
        alpha = min(max(known, low), high)
        return alpha, alpha
    if method == "kl_symmetry":
        return _bracket(lambda alphas: _symmetry_sign(box, alphas), low, high)
    if method == "mirror":
        found = _bracket(lambda alphas: _symmetry_sign(box, alphas), 1 - high, 1 - low)
        return 1 - found[1], 1 - found[0]
    if method == "trust_region":
        limit = mixture.trust_region
        return _bracket(lambda alphas: _trust_sign(box, alphas, limit), low, high)
    return low, high  # reverse_kl_symmetry, entropy: no id outside of the lists may be left out


def _known_alpha(mixture: MixtureConfig, position: int) -> float | None:
    """alpha of the methods that do not look at the models; theirs have one support."""
    if mixture.alpha_method == "fixed":
        return mixture.fixed_alpha
    if mixture.alpha_method == "ess_balance":
        return 0.5
    if mixture.alpha_method == "schedule":
        start, end = mixture.schedule_start, mixture.schedule_end
        return start + (end - start) * min(position / mixture.schedule_tokens, 1.0)
    return None


def _bracket(sign: Callable[[Alphas], Alphas], low: float, high: float) -> Range:
    """Bounds on a root in [low, high]. `sign`: 1 proves that the root lies below, -1 above.

    Every proof holds by itself, so that a coarse search gives a wider interval and no wrong one.
    """
    if low == high:
        return low, high
    left, right = low, high
    grid = np.linspace(max(low, _INSIDE), min(high, 1 - _INSIDE), _GRID + 1)
    first, last = high, low
    for _ in range(_ROUNDS):
        signs = sign(grid)
        before = right - left
        left = max([left, *grid[signs < 0]])
        right = min([right, *grid[signs > 0]])
        if right - left > _SHRINKS * before:
            break
        open_ends = grid[signs == 0]
        first = min([first, *open_ends, right])
        last = max([last, *open_ends, left])
        parts = (np.linspace(left, first, _GRID), np.linspace(last, right, _GRID))
        grid = np.clip(np.concatenate(parts), _INSIDE, 1 - _INSIDE)
    return min(left, right), right


def _symmetry_sign(box: Box, alphas: Alphas) -> Alphas:
    """Of F', which grows and whose root is alpha of kl_symmetry; lemma 3."""
    lowest = box.student_total[0] - box.teacher_total[1]
    highest = box.student_total[1] - box.teacher_total[0]
    least, most = _slope_limits(box, box.teacher + lowest, alphas)
    if highest > lowest:
        _, most = _slope_limits(box, box.teacher + highest, alphas)
    return _sign(least.sum(-1), most.sum(-1))


def _trust_sign(box: Box, alphas: Alphas, limit: float) -> Alphas:
    """Of KL(q||p_student) - limit, which grows; lemma 4."""
    weights = _weights(box.student, box.teacher, alphas)
    most_z = weights.sum(-1)
    least_z = (weights * box.exact).sum(-1)
    least, most = (each.sum(-1) for each in _slope_limits(box, box.teacher, alphas))
    with np.errstate(divide="ignore", invalid="ignore"):
        smallest = least / np.where(least > 0, most_z, least_z)
        largest = most / np.where(most > 0, least_z, most_z)
        low = alphas * smallest - np.log(most_z) + box.student_total[0] - limit
        high = alphas * largest - np.log(least_z) + box.student_total[1] - limit
    return _sign(low, high)


def _sign(least: Alphas, most: Alphas) -> Alphas:
    return (least > _ROUNDING).astype(float) - (most < -_ROUNDING)


# The bound


def total_variation_bound(
    box: Box, mixture: MixtureConfig, position: int, alpha: float, q: Numbers
) -> float:
    """A bound on TV(q of the lists, q of the whole rows), both before top-k and top-p.

    `alpha`: that of q of the lists; `q`: the probabilities of the ids of the union. ValueError for
    a mixture without a bound.
    """
    if mixture.alpha_method == "arithmetic":
        forced = mixture.force_first_token and position == 0
        return _arithmetic_bound(box, 1.0 if forced else mixture.arithmetic_weight, q)
    if not mixture.is_geometric:
        raise ValueError(f"no bound is known for alpha_method {mixture.alpha_method}")
    low, high = alpha_interval(box, mixture, position)
    return _geometric_bound(box, alpha, low, high)


def _exact_at(box: Box, low: float, high: float) -> Flags:
    """Ids whose weight is known; at alpha = 0 or 1 that of one model."""
    exact = box.exact
    if low == high == 0:
        exact = box.student_known & box.certain
    if low == high == 1:
        exact = box.teacher_known & box.certain
    return exact


def _arithmetic_bound(box: Box, weight: float, q: Numbers) -> float:
    """Sum of what q of the lists has above the least that q can have."""
    student = np.where(box.student_known & box.certain, box.student - box.student_total[1], NEVER)
    teacher = np.where(box.teacher_known & box.certain, box.teacher - box.teacher_total[1], NEVER)
    least = (1 - weight) * np.exp(student) + weight * np.exp(teacher)
    excess: float = np.maximum(q - least[:-1], 0.0).sum()
    return min(1.0, excess)


def _geometric_bound(box: Box, alpha: float, low: float, high: float) -> float:
    """Shift of alpha and what is not known at each alpha of the interval, piece by piece."""
    ends = np.unique(np.linspace(low, high, _PIECES + 1))
    shift = _shift(box, alpha, ends)
    if len(ends) == 1:
        return float(min(1.0, shift[0] + _gap(box, ends, ends)[0]))
    shift = np.maximum(shift[:-1], shift[1:])
    return float(min(1.0, (shift + _gap(box, ends[:-1], ends[1:])).max()))


def _shift(box: Box, alpha: float, ends: Alphas) -> Alphas:
    """TV between q of the lists at `alpha` and at other alphas; it grows with the distance."""
    student, teacher = (each[box.drawn] for each in box.guess)
    weights = _weights(student, teacher, np.append(ends, alpha))
    q = weights / weights.sum(-1, keepdims=True)
    shift: Alphas = np.abs(q[:-1] - q[-1]).sum(-1) / 2
    return shift


def _gap(box: Box, low: Alphas, high: Alphas) -> Alphas:
    """Most of TV(q of the lists, q) at one alpha, over pieces [low, high] of alpha; theorem 1."""
    exact = _exact_at(box, float(low[0]), float(high[-1]))
    open_ids = ~exact & box.drawn
    known = _least_known(box, exact, low, high)
    most = _most(box.student[open_ids], box.teacher[open_ids], low, high)
    hidden = ~exact & ~box.drawn
    rest = _most(box.student[hidden], box.teacher[hidden], low, high)
    student, teacher = box.guess
    taken = _most(student[open_ids], teacher[open_ids], low, high)
    share = _least_share(box, open_ids, low, high)
    total = _most(student[box.drawn], teacher[box.drawn], low, high)
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = np.clip(np.sqrt(known * total / share) - known - rest, 0.0, most)
        worst = np.where(np.isnan(worst), most, worst)
        lost = 1 - share * worst / total - known / (known + worst + rest)
        surplus = taken / (known + taken)
    gap: Alphas = np.nan_to_num(np.maximum(lost, np.where(taken > 0, surplus, 0.0)), nan=1.0)
    return gap


def _least_known(box: Box, exact: Flags, low: Alphas, high: Alphas) -> Alphas:
    """Least over a piece of the known weight, whose log is convex: above its tangent."""
    middle = (low + high) / 2
    student, teacher = box.student[exact], box.teacher[exact]
    weight = _weights(student, teacher, middle).sum(-1)
    slope = _psi(student, teacher, middle).sum(-1) / np.maximum(weight, _TINY)
    least: Alphas = weight * np.exp(-np.abs(slope) * (high - low) / 2)
    return least


def _most(student: Numbers, teacher: Numbers, low: Alphas, high: Alphas) -> Alphas:
    """Most over a piece of a sum of weights, which is convex: that at one of its ends."""
    ends = (_weights(student, teacher, each).sum(-1) for each in (low, high))
    most: Alphas = np.maximum(*ends)
    return most


def _least_share(box: Box, ids: Flags, low: Alphas, high: Alphas) -> Alphas:
    """Least share that what is taken for a weight has of the most that it can be."""
    student = (box.guess[0] - box.student)[ids]
    teacher = (box.guess[1] - box.teacher)[ids]
    ends = [_weights(student, teacher, each).min(-1, initial=1.0) for each in (low, high)]
    least: Alphas = np.minimum(*ends)
    return least
