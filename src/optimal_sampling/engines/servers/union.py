"""Lists of two models over the union of their ids: what is known, and how far the rest goes.

All numbers are logs of probabilities at the run's temperature T, up to a constant per model:
log p / T. What is not known of a token is its most.

Arrays are [ids, rows], a row being a token to draw. A sum over ids adds them one after another, so
that a row's bits depend neither on the rows beside it nor on the ids that these have more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Int64

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.servers.model import TokenList

__all__ = [
    "NEVER",
    "ROLES",
    "Flags",
    "Logs",
    "Mask",
    "PerRow",
    "Side",
    "Support",
    "Union",
    "find_support",
    "join",
    "log_sum",
    "sum_of",
]

ROLES = ("student", "teacher")

NEVER = -1e8
"""Stands for log 0: its multiples by 0 are 0, and exp((1 - alpha) NEVER) is 0 for alpha near 1."""

_LEAST_MASS = 1e-12  # of the tail, where rounding leaves none

Logs: TypeAlias = Float64[np.ndarray, "ids rows"]
Mask: TypeAlias = Bool[np.ndarray, "ids rows"]
PerRow: TypeAlias = Float64[np.ndarray, " rows"]
Flags: TypeAlias = Bool[np.ndarray, " rows"]
Counts: TypeAlias = Int64[np.ndarray, " rows"]


def sum_of(numbers: Logs) -> PerRow:
    """Sum of every row, one number after another: that of NumPy goes by the shape."""
    total: PerRow = np.add.accumulate(numbers, 0)[-1]
    return total


def log_sum(logs: Logs) -> PerRow:
    """log of the sum of exponentials of every row; NEVER for nothing."""
    top = logs.max(0, initial=NEVER)
    total = sum_of(np.exp(logs - top))
    found: PerRow = np.where(top > NEVER, top + np.log(np.maximum(total, 1.0)), NEVER)
    return found


def _log(x: PerRow) -> PerRow:
    is_any = x > 0
    found: PerRow = np.where(is_any, np.log(np.where(is_any, x, 1.0)), NEVER)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One model over the ids of a union."""

    log_p: Logs
    """Of every id; the most that it can be where it is not known."""
    known: Mask
    """Also where a row has no such id."""
    listed: Mask
    """The likeliest tokens of the model."""
    vocab_size: int
    least: PerRow
    """log p of the last of the likeliest: no id that is not listed has more."""
    most: PerRow
    """log p of an id that is not known, at most."""
    rest: tuple[PerRow, PerRow]
    """Bounds on the log of the mass outside of the list."""
    covered: PerRow
    """Mass of the list at temperature 1."""
    outside: PerRow
    """Most of the mass outside of the list at temperature 1."""
    temperature: float

    @property
    def listed_count(self) -> Counts:
        """Number of ids that are listed."""
        count: Counts = self.listed.sum(0)
        return count

    @property
    def total(self) -> tuple[PerRow, PerRow]:
        """Bounds on the log of the sum over the vocabulary."""
        known = log_sum(np.where(self.known, self.log_p, NEVER))
        low, high = (np.logaddexp(known, rest) for rest in self.rest)
        return low, high

    def guessed(self, share: PerRow | float) -> Logs:
        """log p of every id and, as the last one, of the tail: all ids outside of the union.

        An id that is not known is taken for a share of the most that it can be, `share` of
        p^(1 / temperature); all of them at most for what is left, and the tail for the rest.
        """
        power, left = 1 / self.temperature, self.outside
        unknown = (~self.known).sum(0)
        most = np.exp(self.most * self.temperature) * share**self.temperature
        each = np.minimum(most, left / np.maximum(unknown, 1))
        log_p = np.where(self.known, self.log_p, np.maximum(NEVER, _log(each) * power))
        left = np.maximum(left - unknown * each, _LEAST_MASS)
        count = np.maximum(self.vocab_size - self.listed_count, 1)
        bounds = _rest_of(left, count, self.least * self.temperature, power)
        tail = np.maximum(NEVER, (bounds[0] + bounds[1]) / 2)
        return np.concatenate([log_p, tail[None]])


@dataclass(frozen=True, slots=True, eq=False)
class Union:
    """Student and teacher over the ids of both lists of every row."""

    ids: Int64[np.ndarray, "ids rows"]
    """Ascending in every row, which has the first `count`; the vocabulary's size beyond."""
    count: Counts
    """Number of ids of every row."""
    most_ids: int
    """That a row of lists of this length can have."""
    student: Side
    teacher: Side

    @property
    def present(self) -> Mask:
        """The ids that a row has."""
        present: Mask = np.arange(len(self.ids))[:, None] < self.count
        return present

    @property
    def is_whole(self) -> Flags:
        """Rows without other ids."""
        whole: Flags = self.count == self.student.vocab_size
        return whole

    @property
    def is_known(self) -> bool:
        """Whether both models are known for all of the ids."""
        return bool(self.student.known.all() and self.teacher.known.all())


def join(
    student: Sequence[TokenList],
    teacher: Sequence[TokenList],
    vocab_size: int,
    temperature: float = 1.0,
    more_ids: tuple[float, float] = (0, 0),
) -> Union:
    """The union of two lists for every row. All rows have lists of the same lengths.

    Ids from `vocab_size` on, which one model has alone, are left out. `more_ids`: how many of them
    the student and the teacher have; infinity: unknown.
    """
    lists = [np.array([each.ids for each in side], np.int64).T for side in (student, teacher)]
    raw = np.concatenate(lists)
    place, count = _places(raw, vocab_size)
    most_ids = len(raw)
    ids = np.full((most_ids + 1, len(student)), vocab_size)
    np.put_along_axis(ids, place, raw, 0)
    present = np.arange(max(1, count.max()))[:, None] < count
    places = np.split(place, [len(lists[0])])
    sides = [
        _side(each, found, present, (vocab_size, more), temperature)
        for each, found, more in zip((student, teacher), places, more_ids, strict=True)
    ]
    return Union(ids[: len(present)], count, most_ids, *sides)


def _places(
    raw: Int64[np.ndarray, "raw rows"], vocab_size: int
) -> tuple[Int64[np.ndarray, "raw rows"], Counts]:
    """Where every entry stands among the ids of its row, ascending; and the number of ids.

    Entries that are left out have the place after the last that there can be.
    """
    order = raw.argsort(0)
    ranked = np.take_along_axis(raw, order, 0)
    is_new = np.ones(raw.shape, bool)
    is_new[1:] = ranked[1:] != ranked[:-1]
    is_new &= ranked < vocab_size
    numbered = is_new.cumsum(0)
    numbers = np.where(ranked < vocab_size, numbered - 1, len(raw))
    place = np.empty_like(raw)
    np.put_along_axis(place, order, numbers, 0)
    return place, numbered[-1]


def _side(
    lists: Sequence[TokenList],
    place: Int64[np.ndarray, "entries rows"],
    present: Mask,
    sizes: tuple[int, float],
    temperature: float,
) -> Side:
    """One model. `place`: of every entry of its lists among the ids; `sizes`: of the vocabulary,
    and how many more ids the model has.
    """
    vocab_size, more_ids = sizes
    values = np.maximum(np.array([each.log_p for each in lists]).T, NEVER)
    length = np.array([each.listed for each in lists])
    inside = place < len(present)
    mass = np.exp(values)
    covered = np.minimum(1.0, sum_of(np.where(inside, mass, 0.0)))
    left_out = sum_of(np.where(inside, 0.0, mass)) + np.array([each.left_out for each in lists])
    is_full = np.array([each.is_full for each in lists])
    count = np.where(is_full, 0, vocab_size - inside.sum(0))
    kth = values[length - 1, np.arange(len(lists))]
    left = np.maximum(0.0, 1.0 - covered - left_out)
    more = left if more_ids == math.inf else more_ids * np.exp(kth)
    error = np.array([each.sum_error for each in lists])
    outside = _outside(left, count * np.exp(kth), more, error)
    most = np.minimum(kth, _log(outside[1]))
    log_p = np.where(present, most, NEVER)
    known, listed = ~present, np.zeros_like(present)
    is_listed = np.arange(len(values))[:, None] < length
    for to, what in ((log_p, values), (known, inside), (listed, is_listed)):
        _put(to, place, what)
    return Side(
        log_p=np.maximum(log_p / temperature, NEVER),
        known=known,
        listed=listed,
        vocab_size=vocab_size,
        least=np.maximum(NEVER, kth / temperature),
        most=np.maximum(NEVER, most / temperature),
        rest=_rest(outside, count, kth, 1 / temperature),
        covered=covered,
        outside=outside[1],
        temperature=temperature,
    )


def _put(to: np.ndarray, place: np.ndarray, what: np.ndarray) -> None:
    """Write [entries, rows] to their places in [ids, rows]; those beyond are left out."""
    entry, row = np.nonzero(place < len(to))
    to[place[entry, row], row] = what[entry, row]


def _outside(left: PerRow, most: PerRow, more: PerRow, error: PerRow) -> tuple[PerRow, PerRow]:
    """Bounds on the mass of the ids of the vocabulary that a list lacks, of the mass that it lacks.

    `most`, `more`: what these ids can have at most, and the ids beyond the vocabulary. `error`:
    what a list leaves of 1 is right to that only.
    """
    least = np.maximum(0.0, left - error - more)
    return np.minimum(least, most), np.minimum(left + error, most)


def _rest(
    outside: tuple[PerRow, PerRow], count: Counts, kth: PerRow, power: float
) -> tuple[PerRow, PerRow]:
    """Bounds on log sum p^power over `count` ids that have p <= exp(kth) and a sum in `outside`.

    Between the sum over equal ids and p^(power - 1) <= exp(kth)^(power - 1), or the reverse.
    """
    least, most = (_rest_of(mass, count, kth, power) for mass in outside)
    return np.minimum(*least), np.maximum(*most)


def _rest_of(outside: PerRow, count: Counts, kth: PerRow, power: float) -> tuple[PerRow, PerRow]:
    is_any = outside > 0
    mass = np.log(np.where(is_any, outside, 1.0))
    log_count = np.log(np.maximum(count, 1))
    kth = np.maximum(kth, mass - log_count)  # less is rounding, of a list with all of the mass
    equal = power * mass + (1 - power) * log_count
    steep = mass + (power - 1) * kth
    return np.where(is_any, equal, NEVER), np.where(is_any, steep, NEVER)


@dataclass(frozen=True, slots=True, eq=False)
class Support:
    """The teacher's support S over the ids of a union."""

    certain: Mask
    """Ids that lie in S."""
    possible: Mask
    """Ids that may lie in S."""
    rest: PerRow
    """log of the most mass that the teacher has in S outside of its list."""
    least_mass: PerRow
    """log of the least mass that the teacher has in S."""

    @property
    def is_known(self) -> Flags:
        """Rows whose list says which ids S has."""
        known: Flags = (self.rest <= NEVER) & (self.certain == self.possible).all(0)
        return known


@dataclass(frozen=True, slots=True, eq=False)
class _Ranked:
    """The teacher's listed ids, likeliest first; of equals the smaller id, as in `keep_largest`."""

    rank: Int64[np.ndarray, "ids rows"]
    """Place of every id; those that are not listed come last."""
    log_p: Logs
    """By rank; NEVER beyond the list."""
    within: Logs
    """log of the mass of the first 1, 2, ..."""
    length: Counts

    @classmethod
    def of(cls, teacher: Side) -> _Ranked:
        order = np.where(teacher.listed, -teacher.log_p, np.inf).argsort(0, kind="stable")
        listed = np.where(teacher.listed, teacher.log_p, NEVER)
        log_p = np.take_along_axis(listed, order, 0)
        rank = order.argsort(0)
        return cls(rank, log_p, np.logaddexp.accumulate(log_p), teacher.listed_count)

    def first(self, number: Counts) -> Mask:
        """The first ids of the list, a number of them in every row."""
        found: Mask = self.rank < np.minimum(number, self.length)
        return found


def find_support(union: Union, mixture: MixtureConfig) -> Support | None:
    """What the lists say of `distribution.teacher_support` of the whole rows; None: S is all ids.

    S is the first ids of the list, a certain and a possible number of them; and where it may reach
    beyond the list, any others.
    """
    if not mixture.has_support:
        return None
    teacher = union.teacher
    ranked = _Ranked.of(teacher)
    top_k, top_p = mixture.teacher_support_top_k, mixture.teacher_support_top_p
    most = top_k if top_k > 0 else teacher.vocab_size
    pool, rest = _pool(teacher, ranked, most)
    certain = possible = np.full(len(ranked.length), most)
    reaches = most > ranked.length
    if top_p < 1:
        (certain, possible), missing = _nucleus(ranked, pool, top_p)
        reaches = reaches & (missing > NEVER)
        rest = np.minimum(rest, np.logaddexp(missing, teacher.least))
    if mixture.support_min_p > 0:
        threshold = ranked.log_p[0] + np.log(mixture.support_min_p)
        likely = (ranked.log_p >= threshold).sum(0)
        certain, possible = np.minimum(certain, likely), np.minimum(possible, likely)
        reaches = reaches & (teacher.least >= threshold)
    certainly = ranked.first(certain)
    others = ~teacher.listed & reaches & union.present
    least_mass = log_sum(np.where(certainly, teacher.log_p, NEVER))
    rest = np.where(reaches, rest, NEVER)
    return Support(certainly, ranked.first(possible) | others, rest, least_mass)


def _nucleus(
    ranked: _Ranked, pool: tuple[PerRow, PerRow], top_p: float
) -> tuple[tuple[Counts, Counts], PerRow]:
    """The certain and the possible number of likeliest ids whose share of the pool reaches `top_p`,
    and the log of the most mass that the list lacks for it.
    """
    low, high = (each + np.log(top_p) for each in pool)
    is_before = np.arange(len(ranked.within) - 1)[:, None] < ranked.length - 1
    certain, possible = (
        1 + ((ranked.within[:-1] < wanted) & is_before).sum(0) for wanted in (low, high)
    )
    return (certain, possible), _log(np.exp(high) - np.exp(ranked.within[-1]))


def _pool(teacher: Side, ranked: _Ranked, most: int) -> tuple[tuple[PerRow, PerRow], PerRow]:
    """Bounds on the log of the mass of the teacher's `most` likeliest ids, and the log of the most
    that those of them have which the list does not.
    """
    low, high = teacher.total
    others = np.log(np.maximum(most - ranked.length, 1)) + teacher.least
    if most < teacher.vocab_size:
        low = ranked.within[-1]
        high = np.minimum(high, np.logaddexp(low, others))
    is_listed = most <= ranked.length
    mass = ranked.within[min(most, len(ranked.within)) - 1]
    pool = np.where(is_listed, mass, low), np.where(is_listed, mass, high)
    return pool, np.where(is_listed, NEVER, np.minimum(teacher.rest[1], others))
