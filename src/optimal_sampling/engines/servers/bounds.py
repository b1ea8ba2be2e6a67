"""How far q of two lists can be from q of the whole rows: a proven bound on the total variation.

The proof is in docs/servers.md, whose numbers the comments give. Notation there: s and t are the
models, U the union of the lists, w = s^(1-alpha) t^alpha, Z the sum of w, psi = w log(t/s).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Int64

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.servers.box import (
    Alphas,
    Box,
    Limits,
    Masks,
    Numbers,
    Range,
    Table,
    weights,
)
from optimal_sampling.engines.servers.union import NEVER, Flags, PerRow, sum_of

__all__ = ["alpha_interval", "total_variation_bound"]

Positions = Int64[np.ndarray, " rows"]

_INSIDE = 1e-9  # of alpha: the ends of [0, 1] are no mixtures
_ROUNDING = 1e-13
_SAME = 1e-9  # relative difference of sums by rounding
_TINY = 1e-200  # in place of a sum of weights that is 0
_GRID = 12
_PIECES = 16
_STEPS = np.geomspace(1e-6, 1, 12)
_DISTANCES = np.concatenate([-_STEPS[::-1], [0.0], _STEPS])  # from a guess of alpha
_SLOPES = np.geomspace(0.05, 2, 6)  # multipliers: about 1 / log(t/s)
_MOST_COLUMNS = 4096  # of what is looked at for all multipliers: tens of milliseconds
_SMALL = 1e-4  # a bound that needs not be sharper
_MOST_FACTOR = 10.0  # log of a factor of Z that says nothing
_ONE, _ZERO = np.ones((1, 1, 1)), np.zeros((1, 1, 1))


# alpha


def alpha_interval(
    limits: Limits, mixture: MixtureConfig, position: Positions, guess: PerRow
) -> Range:
    """Where alpha of the exact q lies; of the whole rows, by the method of the mixture.

    `guess`: alpha of the lists, from which the search begins.
    """
    low, high = _free_interval(limits, mixture, position, guess)
    forced = _forced(mixture, position)
    return np.where(forced, 1.0, low), np.where(forced, 1.0, high)


def _forced(mixture: MixtureConfig, position: Positions) -> Flags:
    """Rows whose token is the teacher's."""
    forced: Flags = (position == 0) & mixture.force_first_token
    return forced


def _free_interval(
    limits: Limits, mixture: MixtureConfig, position: Positions, guess: PerRow
) -> Range:
    method = mixture.alpha_method
    ends = (mixture.alpha_min, mixture.alpha_max) if mixture.has_bounds else (0.0, 1.0)
    low, high = (np.full(len(position), end) for end in ends)
    if method == "veto":
        return np.zeros_like(low), np.zeros_like(low)
    known = _known_alpha(mixture, position)
    if known is not None:
        alpha = np.clip(known, low, high)
        return alpha, alpha
    if method == "kl_symmetry":
        return _bracket(partial(_symmetry_sign, limits), (low, high), guess)
    if method == "mirror":
        left, right = _bracket(partial(_symmetry_sign, limits), (1 - high, 1 - low), 1 - guess)
        return 1 - right, 1 - left
    if method == "trust_region":
        sign = partial(_trust_sign, limits, limit=mixture.trust_region)
        return _bracket(sign, (low, high), guess)
    return low, high  # reverse_kl_symmetry, entropy: no id outside of the lists may be left out


def _known_alpha(mixture: MixtureConfig, position: Positions) -> PerRow | float | None:
    """alpha of the methods that do not look at the models; theirs have one support."""
    if mixture.alpha_method == "fixed":
        return mixture.fixed_alpha
    if mixture.alpha_method == "ess_balance":
        return 0.5
    if mixture.alpha_method == "schedule":
        start, end = mixture.schedule_start, mixture.schedule_end
        alpha: PerRow = start + (end - start) * np.minimum(position / mixture.schedule_tokens, 1.0)
        return alpha
    return None


def _bracket(sign: Callable[[Alphas], Alphas], ends: Range, guess: PerRow) -> Range:
    """Bounds on a root between two ends. `sign`: 1 proves that the root lies below, -1 above.

    Every proof holds by itself, so that a coarse search gives a wider interval and no wrong one:
    first around a guess of the root, at distances of all sizes, then where the proofs begin.
    """
    left, right = ends
    if (left == right).all():
        return ends
    around = guess[:, None] + _DISTANCES
    first, last = left, right
    for grid in (around, None):
        if grid is None:
            grid = np.concatenate([_grid(left, first, _GRID), _grid(last, right, _GRID)], -1)
        grid = np.clip(grid, *(end[:, None] for end in ends)).clip(_INSIDE, 1 - _INSIDE)
        signs = sign(grid)
        left = np.maximum(left, np.where(signs < 0, grid, -np.inf).max(-1))
        right = np.minimum(right, np.where(signs > 0, grid, np.inf).min(-1))
        first = np.minimum(right, np.where(signs == 0, grid, np.inf).min(-1))
        last = np.maximum(left, np.where(signs == 0, grid, -np.inf).max(-1))
    return np.clip(np.minimum(left, right), *ends), np.clip(right, *ends)


def _grid(first: PerRow, last: PerRow, count: int) -> Alphas:
    """Equally spaced alphas of every row, with both ends."""
    grid: Alphas = first[:, None] + (last - first)[:, None] * np.linspace(0, 1, count)
    grid[:, -1] = last
    return grid


def _symmetry_sign(limits: Limits, alphas: Alphas) -> Alphas:
    """Of F', which grows and whose root is alpha of kl_symmetry; lemma 4."""
    lowest, highest = (each[:, None, None] for each in limits.box.log_ratio)
    least = limits.least(alphas, lowest, _ONE)
    most = limits.most(alphas, highest, _ONE)
    return _sign(least[..., 0], most[..., 0])


def _trust_sign(limits: Limits, alphas: Alphas, limit: float) -> Alphas:
    """Of KL(q||p_student) - limit, which grows; lemma 5."""
    box = limits.box
    table = weights(box.student, box.teacher, alphas)
    most_z = table.sum(0)
    least_z = (table * box.exact[..., None]).sum(0)
    least = limits.least(alphas, _ZERO, _ONE)[..., 0]
    most = limits.most(alphas, _ZERO, _ONE)[..., 0]
    low, high = (each[:, None] for each in box.student_total)
    with np.errstate(divide="ignore", invalid="ignore"):
        smallest = least / np.where(least > 0, most_z, least_z)
        largest = most / np.where(most > 0, least_z, most_z)
        low = alphas * smallest - np.log(most_z) + low - limit
        high = alphas * largest - np.log(least_z) + high - limit
    return _sign(low, high)


def _sign(least: Alphas, most: Alphas) -> Alphas:
    sign: Alphas = (least > _ROUNDING).astype(float) - (most < -_ROUNDING)
    return sign


# The bound


def total_variation_bound(
    box: Box, mixture: MixtureConfig, position: Positions, alpha: PerRow, q: Numbers
) -> PerRow:
    """A bound on TV(q of the lists, q of the whole rows) of every row, both before top-k and top-p.

    `alpha`, `q`: of the lists; q of the ids of the union, [ids, rows]. ValueError for a mixture
    without a bound.
    """
    forced = _forced(mixture, position)
    if mixture.alpha_method == "arithmetic":
        return _arithmetic_bound(box, np.where(forced, 1.0, mixture.arithmetic_weight), q)
    if not mixture.is_geometric:
        raise ValueError(f"no bound is known for alpha_method {mixture.alpha_method}")
    limits = Limits(box)
    interval = alpha_interval(limits, mixture, position, alpha)
    q = np.concatenate([q, np.zeros_like(q[:1])])
    bound = _geometric_bound(_pieces(box, interval), q)
    if mixture.alpha_method == "kl_symmetry" and len(q) <= _MOST_COLUMNS:
        rows = np.flatnonzero(~forced & (bound > _SMALL))
        if rows.size:
            low, high = (end[rows] for end in interval)
            bound[rows] = _bound_by_symmetry(box.of_rows(rows), (low, high), q.take(rows, -1))
    return bound


def _bound_by_symmetry(box: Box, interval: Range, q: Numbers) -> PerRow:
    """The bound with what lemma 6 says of Z, which takes most of the time."""
    pieces = _pieces(box, interval)
    least, most = _total_by_symmetry(Limits(box), interval)
    total = np.maximum(pieces.total[0], least), np.minimum(pieces.total[1], most)
    return _geometric_bound(replace(pieces, total=total), q)


def _arithmetic_bound(box: Box, weight: PerRow, q: Numbers) -> PerRow:
    """Sum of what q of the lists has above the least that q can have."""
    student = np.where(box.student_known & box.certain, box.student - box.student_total[1], NEVER)
    teacher = np.where(box.teacher_known & box.certain, box.teacher - box.teacher_total[1], NEVER)
    least = (1 - weight) * np.exp(student) + weight * np.exp(teacher)
    bound: PerRow = np.minimum(1.0, sum_of(np.maximum(q - least[:-1], 0.0)))
    return bound


@dataclass(frozen=True, slots=True, eq=False)
class _Pieces:
    """What is known of the weights where alpha lies in one of several intervals.

    The last axis of all arrays is that of the pieces.
    """

    exact: Masks
    """[columns, rows, 1]"""
    open_ids: Masks
    """Ids that q of the lists has, of a weight that is not known. [columns, rows, 1]"""
    most: Table
    """Of the weight of every column."""
    least_known: Alphas
    """Of the sum of the weights that are known."""
    most_known: Alphas
    hidden: Alphas
    """Most of the weight of all ids that q of the lists does not have."""
    total: tuple[Alphas, Alphas]
    """Least and most of the sum of all weights; the most is below the least where alpha cannot lie
    in the piece."""


def _pieces(box: Box, interval: Range) -> _Pieces:
    """The pieces of an interval of alpha."""
    ends = _ends(interval)
    exact, drawn = box.exact_at(*interval)[..., None], box.drawn[..., None]
    table = weights(box.student, box.teacher, ends)
    known = np.where(exact, table, 0.0).sum(0)
    hidden = np.where(exact | drawn, 0.0, table).sum(0)
    least_known = _least_known(box, exact, ends)
    most = _of_pieces(known + _most_unknown(box, exact, ends))
    return _Pieces(
        exact=exact,
        open_ids=~exact & drawn,
        most=_of_pieces(table),
        least_known=least_known,
        most_known=_of_pieces(known),
        hidden=_of_pieces(hidden),
        total=(least_known, most),
    )


def _ends(interval: Range) -> Alphas:
    """Where the pieces of an interval begin and end."""
    return _grid(*interval, _PIECES + 1)


def _of_pieces(at_ends: np.ndarray) -> np.ndarray:
    """Most in every piece of what is convex: that at one of its ends.

    The first and the last end are pieces too: alpha is there also where it was clamped.
    """
    most: np.ndarray = np.maximum(_left(at_ends), _right(at_ends))
    return most


def _left(ends: np.ndarray) -> np.ndarray:
    """Of every piece its left end."""
    return np.concatenate([ends[..., :1], ends], -1)


def _right(ends: np.ndarray) -> np.ndarray:
    return np.concatenate([ends, ends[..., -1:]], -1)


def _most_unknown(box: Box, exact: Masks, ends: Alphas) -> Alphas:
    """Most of the sum of the weights that are not known; lemma 3."""
    corners = ((box.student, box.teacher), *box.spread)
    sums = [np.where(exact, 0.0, weights(s, t, ends)).sum(0) for s, t in corners]
    most: Alphas = np.minimum.reduce(sums)
    return most


def _least_known(box: Box, exact: Masks, ends: Alphas) -> Alphas:
    """Least in a piece of the known weight, whose log is convex: above its tangent."""
    left, right = _left(ends), _right(ends)
    table = np.where(exact, weights(box.student, box.teacher, (left + right) / 2), 0.0)
    weight = table.sum(0)
    slope = (table * (box.teacher - box.student)[..., None]).sum(0) / np.maximum(weight, _TINY)
    least: Alphas = weight * np.exp(-np.abs(slope) * (right - left) / 2)
    return least


def _total_by_symmetry(limits: Limits, interval: Range) -> tuple[Alphas, Alphas]:
    """Least and most of Z in every piece that has the root of F'; lemma 6."""
    ends = _ends(interval)
    lowest, highest = (each[:, None, None] for each in limits.box.log_ratio)
    alphas = np.clip(ends, _INSIDE, 1 - _INSIDE)
    width = (ends[:, -1:] - ends[:, :1]) / _PIECES
    log_factor = np.maximum(np.abs(lowest), np.abs(highest))[..., 0] * width
    factor = np.exp(np.minimum(log_factor, _MOST_FACTOR))
    slopes, steep = _SLOPES[None, None], np.maximum(_SLOPES, width)[:, None]
    # the root lies at or above the end: the slope of Z there is negative
    least_above = limits.least(alphas, 1 + steep * lowest, steep).max(-1)
    most_above = -limits.least(alphas, slopes * lowest - 1, slopes).max(-1)
    # or below it
    least_below = -limits.most(alphas, steep * highest - 1, steep).min(-1)
    most_below = limits.most(alphas, 1 + slopes * highest, slopes).min(-1)
    none, all_ = np.zeros_like(width), np.full_like(width, np.inf)
    least = np.maximum(_joined(none, least_above), _joined(least_below, none))
    most = np.minimum(_joined(all_, most_above), _joined(most_below, all_))
    is_near = log_factor <= _MOST_FACTOR
    return np.where(is_near, least / factor, 0.0), np.where(is_near, most * factor, np.inf)


def _joined(first: Alphas, last: Alphas) -> Alphas:
    return np.concatenate([first, last], -1)


def _geometric_bound(pieces: _Pieces, q: Numbers) -> PerRow:
    """Most of TV over all pieces and all that Z may be there; theorem 1."""
    low, high = pieces.total
    share = _least_share(pieces, q[..., None], low)
    beyond = np.clip(pieces.most_known + pieces.hidden, low, high)
    excess = [_excess(pieces, q[..., None], total, share) for total in (low, beyond, high)]
    possible = high >= low * (1 - _SAME)
    largest = np.where(possible, np.maximum.reduce(excess), -np.inf).max(-1)
    bound: PerRow = np.where(possible.any(-1), np.minimum(1.0, largest), 1.0)
    return bound


def _least_share(pieces: _Pieces, q: Table, total: Alphas) -> Alphas:
    """Least share that q Z has of the most that a weight can be which is not known."""
    shares = q * total / np.maximum(pieces.most, _TINY)
    share: Alphas = np.where(pieces.open_ids, shares, 1.0).min(0, initial=1.0)
    return share


def _excess(pieces: _Pieces, q: Table, total: Alphas, share: Alphas) -> Alphas:
    """Most of the sum of what the exact q has more than `q`, where Z is `total`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        of_known = np.maximum(pieces.most / total - q, 0.0)
        unknown = 1 - pieces.least_known / total
        drawn = np.maximum(1 - (pieces.most_known + pieces.hidden) / total, 0.0)
    excess = np.where(pieces.exact, of_known, 0.0).sum(0) + unknown - share * drawn
    found: Alphas = np.nan_to_num(excess, nan=1.0, posinf=1.0)
    return found
