"""Two lists over the union of their ids: what is known of both models, and how far the rest goes.

All numbers are logs of probabilities at the run's temperature T, up to a constant per model:
log p / T. What is not known of a token is its most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.servers.model import TokenList

__all__ = ["NEVER", "ROLES", "Side", "Support", "Union", "find_support", "join", "log_sum"]

ROLES = ("student", "teacher")

NEVER = -1e8
"""Stands for log 0: its multiples by 0 are 0, and exp((1 - alpha) NEVER) is 0 for alpha near 1."""

_LEAST_MASS = 1e-12  # of the tail, where rounding leaves none
_ROUNDING = 2e-6  # of the sum of a list: twice that of a log-probability from logits below 32

Logs = Float64[np.ndarray, " ids"]
Mask = Bool[np.ndarray, " ids"]


def log_sum(logs: Float64[np.ndarray, " n"]) -> float:
    """log of the sum of exponentials; NEVER for nothing."""
    if not logs.size:
        return NEVER
    top = float(logs.max())
    return max(NEVER, top + math.log(float(np.exp(logs - top).sum())))


def _log(x: float) -> float:
    return math.log(x) if x > 0 else NEVER


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One model over the ids of a union."""

    log_p: Logs
    """Of every id; the most that it can be where it is not known."""
    known: Mask
    rank: Int64[np.ndarray, " ids"]
    """Place among the likeliest tokens of the model; `listed` of those that have none."""
    listed: int
    """Number of ids that have one."""
    count: int
    """Number of ids of the vocabulary that have none."""
    least: float
    """log p of the last of the likeliest: no id outside of the list has more."""
    rest: tuple[float, float]
    """Bounds on the log of the mass outside of the list."""
    covered: float
    """Mass of the list at temperature 1."""
    outside: float
    """Most of the mass outside of the list at temperature 1."""
    temperature: float

    @property
    def total(self) -> tuple[float, float]:
        """Bounds on the log of the sum over the vocabulary."""
        known = log_sum(self.log_p[self.known])
        low, high = (float(np.logaddexp(known, rest)) for rest in self.rest)
        return low, high

    def guessed(self, share: float) -> Logs:
        """log p of every id and of the tail, all ids outside of the union together.

        An id that is not known is taken for a share of the most that it can be, `share` of
        p^(1 / temperature); all of them at most for what is left, and the tail for the rest.
        """
        power, left = 1 / self.temperature, self.outside
        log_p = self.log_p
        unknown = int((~self.known).sum())
        if unknown:
            most = math.exp(self.log_p[~self.known][0] * self.temperature)
            each = min(most * share**self.temperature, left / unknown)
            log_p = np.where(self.known, log_p, max(NEVER, _log(each) * power))
            left -= unknown * each
        kth = self.least * self.temperature
        bounds = _rest_of(max(left, _LEAST_MASS), max(self.count, 1), kth, power)
        return np.append(log_p, max(NEVER, (bounds[0] + bounds[1]) / 2))


@dataclass(frozen=True, slots=True, eq=False)
class Union:
    """Student and teacher over `ids`, the union of their lists, ascending."""

    ids: Int64[np.ndarray, " ids"]
    student: Side
    teacher: Side
    is_whole: bool
    """There are no other ids."""

    @property
    def is_known(self) -> bool:
        """Whether both models are known for all of the ids."""
        return bool(self.student.known.all() and self.teacher.known.all())


def join(
    student: TokenList, teacher: TokenList, vocab_size: int, temperature: float = 1.0
) -> Union:
    """The union of two lists. Ids from `vocab_size` on, which one model has alone, are left out."""
    ids = np.union1d(student.ids, teacher.ids)
    ids = ids[ids < vocab_size]
    sides = [_side(each, ids, vocab_size, temperature) for each in (student, teacher)]
    return Union(ids, sides[0], sides[1], is_whole=len(ids) == vocab_size)


def _side(tokens: TokenList, ids: np.ndarray, vocab_size: int, temperature: float) -> Side:
    inside = tokens.ids < vocab_size
    place = np.searchsorted(ids, tokens.ids[inside])
    values = np.maximum(tokens.log_p[inside], NEVER)
    known = np.zeros(len(ids), dtype=bool)
    known[place] = True
    covered = min(1.0, float(np.exp(values).sum()))
    count = 0 if tokens.is_full else vocab_size - len(place)
    kth = float(max(tokens.log_p[tokens.listed - 1], NEVER))
    outside = _outside(covered, count * math.exp(kth))
    log_p = np.full(len(ids), min(kth, _log(outside[1])))
    log_p[place] = values
    listed = inside & (np.arange(len(inside)) < tokens.listed)
    rank, listed_count = _ranks(np.searchsorted(ids, tokens.ids[listed]), log_p)
    return Side(
        log_p=np.maximum(log_p / temperature, NEVER),
        known=known,
        rank=rank,
        listed=listed_count,
        count=vocab_size - listed_count,
        least=max(NEVER, kth / temperature),
        rest=_rest(outside, count, kth, 1 / temperature),
        covered=covered,
        outside=outside[1],
        temperature=temperature,
    )


def _outside(covered: float, most: float) -> tuple[float, float]:
    """Bounds on the mass outside of a list, of which no more than `most` can be there.

    Servers give numbers of float32: what a list leaves of 1 is right to _ROUNDING only.
    """
    left = max(0.0, 1.0 - covered)
    return min(max(0.0, left - _ROUNDING), most), min(left + _ROUNDING, most)


def _ranks(place: Int64[np.ndarray, " k"], log_p: Logs) -> tuple[Int64[np.ndarray, " ids"], int]:
    """By falling log p, of equals the smaller id first, as `keep_largest` has it."""
    order = np.lexsort((place, -log_p[place]))
    rank = np.full(len(log_p), len(place))
    rank[place[order]] = np.arange(len(place))
    return rank, len(place)


def _rest(
    outside: tuple[float, float], count: int, kth: float, power: float
) -> tuple[float, float]:
    """Bounds on log sum p^power over `count` ids that have p <= exp(kth) and a sum in `outside`.

    Between the sum over equal ids and p^(power - 1) <= exp(kth)^(power - 1), or the reverse.
    """
    bounds = [_rest_of(mass, count, kth, power) for mass in outside]
    return min(bounds[0]), max(bounds[1])


def _rest_of(outside: float, count: int, kth: float, power: float) -> tuple[float, float]:
    if outside <= 0:
        return NEVER, NEVER
    kth = max(kth, math.log(outside / count))  # less is rounding, of a list with all of the mass
    equal = power * math.log(outside) + (1 - power) * math.log(count)
    steep = math.log(outside) + (power - 1) * kth
    return equal, steep


@dataclass(frozen=True, slots=True, eq=False)
class Support:
    """The teacher's support S over the ids of a union."""

    certain: Mask
    """Ids that lie in S."""
    possible: Mask
    """Ids that may lie in S."""
    rest: float
    """log of the most mass that the teacher has in S outside of its list."""
    least_mass: float
    """log of the least mass that the teacher has in S."""

    @property
    def is_known(self) -> bool:
        """Whether the list says which ids S has."""
        return self.rest <= NEVER and bool((self.certain == self.possible).all())


def find_support(teacher: Side, mixture: MixtureConfig) -> Support | None:
    """What the list says of `distribution.teacher_support` of the whole row; None: S is all ids.

    S is the first ids of the list, a certain and a possible number of them; and where it may reach
    beyond the list, any others.
    """
    if not mixture.has_support:
        return None
    order = np.argsort(teacher.rank, kind="stable")[: teacher.listed]
    ranked = teacher.log_p[order]
    top_k, top_p = mixture.teacher_support_top_k, mixture.teacher_support_top_p
    most = top_k if top_k > 0 else teacher.listed + teacher.count
    pool, rest = _pool(teacher, ranked, most)
    lengths = [most, most]
    reaches = most > len(ranked)
    if top_p < 1:
        lengths, missing = _nucleus(ranked, pool, top_p)
        reaches = reaches and missing > NEVER
        rest = min(rest, float(np.logaddexp(missing, teacher.least)))
    if mixture.support_min_p > 0:
        threshold = ranked[0] + math.log(mixture.support_min_p)
        lengths.append(int((ranked >= threshold).sum()))
        reaches = reaches and teacher.least >= threshold
    certain = np.zeros(len(teacher.rank), dtype=bool)
    certain[order[: min(lengths)]] = True
    possible = np.full(len(certain), reaches) & (teacher.rank >= teacher.listed)
    possible[order[: min(lengths[1:])]] = True
    least_mass = log_sum(teacher.log_p[certain])
    return Support(certain, possible, rest if reaches else NEVER, least_mass)


def _nucleus(ranked: Logs, pool: tuple[float, float], top_p: float) -> tuple[list[int], float]:
    """The certain and the possible number of likeliest ids whose share of the pool reaches `top_p`,
    and the log of the most mass that the list lacks for it.
    """
    before = np.array([log_sum(ranked[:end]) for end in range(len(ranked))])
    wanted = [each + math.log(top_p) for each in pool]
    lengths = [max(1, int((before < each).sum())) for each in wanted]
    missing = math.exp(wanted[1]) - math.exp(log_sum(ranked))
    return lengths, _log(missing)


def _pool(teacher: Side, ranked: Logs, most: int) -> tuple[tuple[float, float], float]:
    """Bounds on the log of the mass of the teacher's `most` likeliest ids, and the log of the most
    that those of them have which the list does not.
    """
    if most <= len(ranked):
        mass = log_sum(ranked[:most])
        return (mass, mass), NEVER
    low, high = teacher.total
    others = math.log(most - len(ranked)) + teacher.least
    if most < len(ranked) + teacher.count:
        low = log_sum(ranked)
        high = min(high, float(np.logaddexp(low, others)))
    return (low, high), min(teacher.rest[1], others)
