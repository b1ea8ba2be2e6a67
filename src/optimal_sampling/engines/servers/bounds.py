"""How far q of two lists can be from q of the whole rows: a proven bound on the total variation.

The proof is in docs/servers.md, whose numbers the comments give. Notation there: s and t are the
models, U the union of the lists, w = s^(1-alpha) t^alpha, Z the sum of w, psi = w log(t/s).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.servers.box import (
    Alphas,
    Box,
    Flags,
    Numbers,
    Range,
    Table,
    least_sum,
    most_sum,
    weights,
)
from optimal_sampling.engines.servers.union import NEVER

__all__ = ["alpha_interval", "total_variation_bound"]

_INSIDE = 1e-9  # of alpha: the ends of [0, 1] are no mixtures
_ROUNDING = 1e-13
_SAME = 1e-9  # relative difference of sums by rounding
_TINY = 1e-200  # in place of a sum of weights that is 0
_GRID = 16
_ROUNDS = 3
_PIECES = 16
_SHRINKS = 0.98  # a round that leaves more of the interval is the last
_SLOPES = np.geomspace(0.05, 2, 6)  # multipliers: about 1 / log(t/s)
_MOST_COLUMNS = 4096  # of what is looked at for all multipliers: tens of milliseconds
_MOST_FACTOR = 10.0  # log of a factor of Z that says nothing
_ONE, _ZERO = np.ones(1), np.zeros(1)


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
    """Of F', which grows and whose root is alpha of kl_symmetry; lemma 4."""
    lowest, highest = box.log_ratio
    least = least_sum(box, alphas, np.array([lowest]), _ONE)
    most = most_sum(box, alphas, np.array([highest]), _ONE)
    return _sign(least[:, 0], most[:, 0])


def _trust_sign(box: Box, alphas: Alphas, limit: float) -> Alphas:
    """Of KL(q||p_student) - limit, which grows; lemma 5."""
    table = weights(box.student, box.teacher, alphas)
    most_z = table.sum(-1)
    least_z = (table * box.exact).sum(-1)
    least = least_sum(box, alphas, _ZERO, _ONE)[:, 0]
    most = most_sum(box, alphas, _ZERO, _ONE)[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        smallest = least / np.where(least > 0, most_z, least_z)
        largest = most / np.where(most > 0, least_z, most_z)
        low = alphas * smallest - np.log(most_z) + box.student_total[0] - limit
        high = alphas * largest - np.log(least_z) + box.student_total[1] - limit
    return _sign(low, high)


def _sign(least: Alphas, most: Alphas) -> Alphas:
    return (least > _ROUNDING).astype(float) - (most < -_ROUNDING)


# The bound


def total_variation_bound(box: Box, mixture: MixtureConfig, position: int, q: Numbers) -> float:
    """A bound on TV(q of the lists, q of the whole rows), both before top-k and top-p.

    `q`: the probabilities of the ids of the union. ValueError for a mixture without a bound.
    """
    forced = mixture.force_first_token and position == 0
    if mixture.alpha_method == "arithmetic":
        return _arithmetic_bound(box, 1.0 if forced else mixture.arithmetic_weight, q)
    if not mixture.is_geometric:
        raise ValueError(f"no bound is known for alpha_method {mixture.alpha_method}")
    low, high = alpha_interval(box, mixture, position)
    pieces = _pieces(box, low, high, mixture.alpha_method == "kl_symmetry" and not forced)
    return _geometric_bound(pieces, np.append(q, 0.0))


def _arithmetic_bound(box: Box, weight: float, q: Numbers) -> float:
    """Sum of what q of the lists has above the least that q can have."""
    student = np.where(box.student_known & box.certain, box.student - box.student_total[1], NEVER)
    teacher = np.where(box.teacher_known & box.certain, box.teacher - box.teacher_total[1], NEVER)
    least = (1 - weight) * np.exp(student) + weight * np.exp(teacher)
    excess: float = np.maximum(q - least[:-1], 0.0).sum()
    return min(1.0, excess)


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """What is known of the weights where alpha lies in one of several intervals, [pieces]."""

    exact: Flags
    open_ids: Flags
    """Ids that q of the lists has, of a weight that is not known."""
    most: Table
    """Of the weight of every column, [pieces, columns]."""
    least_known: Alphas
    """Of the sum of the weights that are known."""
    most_known: Alphas
    hidden: Alphas
    """Most of the weight of all ids that q of the lists does not have."""
    total: tuple[Alphas, Alphas]
    """Least and most of the sum of all weights; the most is below the least where alpha cannot lie
    in the piece."""


def _pieces(box: Box, low: float, high: float, is_symmetric: bool) -> _Pieces:
    """The pieces of an interval of alpha. `is_symmetric`: it is of kl_symmetry."""
    ends = np.unique(np.linspace(low, high, _PIECES + 1))
    # alpha is an end also where it was clamped to it
    left, right = np.append(ends[0], ends), np.append(ends, ends[-1])
    exact = box.exact_at(low, high)
    table = weights(box.student, box.teacher, ends)
    known = (table * exact).sum(-1)
    hidden = (table * (~exact & ~box.drawn)).sum(-1)
    least_known = _least_known(box, exact, left, right)
    total = (least_known, _of_pieces(known + _most_unknown(box, exact, ends)))
    if is_symmetric and len(exact) <= _MOST_COLUMNS:
        found = _total_by_symmetry(box, ends)
        total = (np.maximum(total[0], found[0]), np.minimum(total[1], found[1]))
    return _Pieces(
        exact=exact,
        open_ids=~exact & box.drawn,
        most=_of_pieces(table),
        least_known=least_known,
        most_known=_of_pieces(known),
        hidden=_of_pieces(hidden),
        total=total,
    )


def _of_pieces(at_ends: np.ndarray) -> np.ndarray:
    """Most in every piece of what is convex: that at one of its ends."""
    first, last = at_ends[:1], at_ends[-1:]
    most: np.ndarray = np.maximum(np.concatenate([first, at_ends]), np.concatenate([at_ends, last]))
    return most


def _most_unknown(box: Box, exact: Flags, ends: Alphas) -> Alphas:
    """Most of the sum of the weights that are not known; lemma 3."""
    corners = ((box.student, box.teacher), *box.spread)
    sums = [weights(s[~exact], t[~exact], ends).sum(-1) for s, t in corners]
    most: Alphas = np.min(sums, axis=0)
    return most


def _least_known(box: Box, exact: Flags, left: Alphas, right: Alphas) -> Alphas:
    """Least in a piece of the known weight, whose log is convex: above its tangent."""
    student, teacher = box.student[exact], box.teacher[exact]
    table = weights(student, teacher, (left + right) / 2)
    weight = table.sum(-1)
    slope = (table * (teacher - student)).sum(-1) / np.maximum(weight, _TINY)
    least: Alphas = weight * np.exp(-np.abs(slope) * (right - left) / 2)
    return least


def _total_by_symmetry(box: Box, ends: Alphas) -> tuple[Alphas, Alphas]:
    """Least and most of Z in every piece that has the root of F'; lemma 6."""
    lowest, highest = box.log_ratio
    alphas = np.clip(ends, _INSIDE, 1 - _INSIDE)
    width = float(ends[1] - ends[0]) if len(ends) > 1 else 0.0
    log_factor = max(abs(lowest), abs(highest)) * width
    if log_factor > _MOST_FACTOR:
        return np.zeros(len(ends) + 1), np.full(len(ends) + 1, np.inf)
    steep = np.maximum(_SLOPES, width)
    # the root lies at or above the end: the slope of Z there is negative
    least_above = least_sum(box, alphas, 1 + steep * lowest, steep).max(-1)
    most_above = -least_sum(box, alphas, _SLOPES * lowest - 1, _SLOPES).max(-1)
    # or below it
    least_below = -most_sum(box, alphas, steep * highest - 1, steep).min(-1)
    most_below = most_sum(box, alphas, 1 + _SLOPES * highest, _SLOPES).min(-1)
    least = np.maximum(np.append(0.0, least_above), np.append(least_below, 0.0))
    most = np.minimum(np.append(np.inf, most_above), np.append(most_below, np.inf))
    return least / np.exp(log_factor), most * np.exp(log_factor)


def _geometric_bound(pieces: _Pieces, q: Numbers) -> float:
    """Most of TV over all pieces and all that Z may be there; theorem 1."""
    low, high = pieces.total
    share = _least_share(pieces, q, low)
    beyond = np.clip(pieces.most_known + pieces.hidden, low, high)
    excess = [_excess(pieces, q, total, share) for total in (low, beyond, high)]
    possible = high >= low * (1 - _SAME)
    if not possible.any():
        return 1.0
    return min(1.0, float(np.max(excess, axis=0)[possible].max()))


def _least_share(pieces: _Pieces, q: Numbers, total: Alphas) -> Alphas:
    """Least share that q Z has of the most that a weight can be which is not known."""
    most = np.maximum(pieces.most[:, pieces.open_ids], _TINY)
    share: Alphas = (q[pieces.open_ids] * total[:, None] / most).min(-1, initial=1.0)
    return share


def _excess(pieces: _Pieces, q: Numbers, total: Alphas, share: Alphas) -> Alphas:
    """Most of the sum of what the exact q has more than `q`, where Z is `total`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        of_known = pieces.most[:, pieces.exact] / total[:, None] - q[pieces.exact]
        unknown = 1 - pieces.least_known / total
        drawn = np.maximum(1 - (pieces.most_known + pieces.hidden) / total, 0.0)
    excess = np.maximum(of_known, 0.0).sum(-1) + unknown - share * drawn
    found: Alphas = np.nan_to_num(excess, nan=1.0, posinf=1.0)
    return found
