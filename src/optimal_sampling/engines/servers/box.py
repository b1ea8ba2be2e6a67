"""All pairs of distributions that have two given lists, and limits of sums over their weights.

The proof is in docs/servers.md, whose numbers the comments give. Notation there: s and t are the
models, w = s^(1-alpha) t^alpha, psi = w log(t/s). Arrays begin with [columns, rows] and go on with
alphas and terms; see union.py for why the columns come first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float64, Int64

from optimal_sampling.engines.servers.union import (
    NEVER,
    PerRow,
    Side,
    Support,
    Union,
    log_sum,
)

__all__ = [
    "Alphas",
    "Box",
    "Limits",
    "Masks",
    "Numbers",
    "Range",
    "Table",
    "box_of",
    "weights",
]

Numbers: TypeAlias = Float64[np.ndarray, "columns rows"]
Masks: TypeAlias = Bool[np.ndarray, "columns rows"]
Alphas: TypeAlias = Float64[np.ndarray, "rows alphas"]
Table: TypeAlias = Float64[np.ndarray, "columns rows alphas"]
Constants: TypeAlias = Float64[np.ndarray, "#rows #alphas #terms"]
Sums: TypeAlias = Float64[np.ndarray, "rows alphas terms"]
Range: TypeAlias = tuple[PerRow, PerRow]
Corner: TypeAlias = tuple[Numbers, Numbers]
"""log s and log t."""
Corners: TypeAlias = tuple[Float64[np.ndarray, "corners open rows"], Float64[np.ndarray, "..."]]


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """Limits of every id's log s and log t.

    The last column stands for all ids outside of the union together.
    """

    student: Numbers
    """log s, or the most that it can be."""
    teacher: Numbers
    student_known: Masks
    """Where the id has any weight at all, log s is this."""
    teacher_known: Masks
    certain: Masks
    """The id certainly lies in the teacher's support."""
    drawn: Masks
    """q of the lists has the id."""
    spread: tuple[Corner, Corner]
    """What the ids that are not known have where the mass outside of a list is spread so that sums
    of weights are largest; lemma 3. The last column is one of the ids that share the teacher's mass
    in the first, and of those that share the student's in the second."""
    student_total: Range
    """Bounds on the log of the student's mass in the support."""
    teacher_total: Range

    @property
    def exact(self) -> Masks:
        """Ids whose weight is known."""
        exact: Masks = self.student_known & self.teacher_known & self.certain
        return exact

    def exact_at(self, low: PerRow, high: PerRow) -> Masks:
        """Ids whose weight is known for alpha in [low, high]; at 0 or 1 that of one model."""
        is_student, is_teacher = (low == 0) & (high == 0), (low == 1) & (high == 1)
        student = self.student_known | is_teacher
        exact: Masks = student & (self.teacher_known | is_student) & self.certain
        return exact

    def of_rows(self, rows: Int64[np.ndarray, " some"]) -> Box:
        """Some of the rows."""

        def taken(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(taken, value))
            return value.take(rows, -1)

        return Box(**{each.name: taken(getattr(self, each.name)) for each in fields(self)})

    @property
    def log_ratio(self) -> Range:
        """Bounds on log s(S) - log t(S)."""
        low = self.student_total[0] - self.teacher_total[1]
        return low, self.student_total[1] - self.teacher_total[0]


def box_of(union: Union, support: Support | None) -> Box:
    """What two lists, and the teacher's support where there is one, leave open."""
    student, teacher, present = union.student, union.teacher, union.present
    possible = certain = present
    left = (student.rest[1], teacher.rest[1])
    is_closed = union.is_whole
    drawn, totals = present, (student.total, teacher.total)
    if support is not None:
        possible, certain = support.possible & present, support.certain
        left = (student.rest[1], support.rest)
        is_closed = is_closed | (support.rest <= NEVER)
        drawn = possible & teacher.known
        totals = (_student_total(student, support), _teacher_total(teacher, support))
    never = _with_tail(~possible, False)  # no weight, which is known
    most = tuple(
        _with_tail(np.where(possible, side.log_p, NEVER), np.where(is_closed, NEVER, rest))
        for side, rest in zip((student, teacher), left, strict=True)
    )
    known = tuple(_with_tail(side.known, False) | never for side in (student, teacher))
    box = Box(
        student=most[0],
        teacher=most[1],
        student_known=known[0],
        teacher_known=known[1],
        certain=_with_tail(certain, False) | never,
        drawn=_with_tail(drawn, False),
        spread=_spread(most, known, left),
        student_total=totals[0],
        teacher_total=totals[1],
    )
    return _scaled(box)


def _with_tail(columns: np.ndarray, tail: PerRow | bool) -> np.ndarray:
    found = np.empty((len(columns) + 1, columns.shape[1]), columns.dtype)
    found[:-1], found[-1] = columns, tail
    return found


def _scaled(box: Box) -> Box:
    """The same with t scaled so that s(S) and t(S) are about equal, which q does not depend on.

    Then Z is about the same for all alpha near that of kl_symmetry.
    """
    shift = box.student_total[1] - box.teacher_total[1]
    low, high = box.teacher_total
    first, second = ((student, teacher + shift) for student, teacher in box.spread)
    return replace(
        box,
        teacher=box.teacher + shift,
        spread=(first, second),
        teacher_total=(low + shift, high + shift),
    )


def _student_total(student: Side, support: Support) -> Range:
    certain, possible = support.certain & student.known, support.possible & student.known
    low, high = (log_sum(np.where(each, student.log_p, NEVER)) for each in (certain, possible))
    unknown = log_sum(np.where(support.possible & ~student.known, student.log_p, NEVER))
    rest = np.minimum(student.rest[1], np.where(support.rest > NEVER, np.inf, unknown))
    return low, np.logaddexp(high, rest)


def _teacher_total(teacher: Side, support: Support) -> Range:
    known = log_sum(np.where(support.possible & teacher.known, teacher.log_p, NEVER))
    return support.least_mass, np.logaddexp(known, support.rest)


def _spread(
    most: tuple[Numbers, ...], known: tuple[Masks, ...], left: Range
) -> tuple[Corner, Corner]:
    """The masses outside of both lists, spread. The tail is one of the teacher's ids, then of the
    student's.
    """
    cases = [(model, tail) for tail in (1, 0) for model in (0, 1)]
    among = np.concatenate([~known[model] for model, _ in cases], 1)
    is_with_tail = [model == tail for model, tail in cases]
    among[-1] = np.repeat(is_with_tail, known[0].shape[1])
    spread = _in_proportion(
        np.concatenate([most[model] for model, _ in cases], 1),
        np.concatenate([most[1 - model] for model, _ in cases], 1),
        among,
        np.concatenate([left[model] for model, _ in cases]),
    )
    first, second, third, fourth = np.split(spread, len(cases), 1)
    return (first, second), (third, fourth)


def _in_proportion(most: Numbers, others: Numbers, among: Masks, total: PerRow) -> Numbers:
    """Logs of numbers in proportion to `others`, but at most `most`, with a given sum at most.

    `among`: the columns that are so; the others are as in `most`.
    """
    largest = np.where(among, most, NEVER)
    is_within = log_sum(largest) <= total
    if is_within.all():
        return most
    order = np.where(among, most - others, np.inf).argsort(0, kind="stable")  # first at their most
    shares = np.where(among, others, -np.inf)  # less than NEVER, of which an open id may have all
    largest, shares = (np.take_along_axis(each, order, 0) for each in (largest, shares))
    scale = np.where(total > NEVER, total, 0.0)
    caps = np.exp(largest - scale)
    open_mass = np.maximum(1 - np.cumsum(caps, 0) + caps, 0)
    beyond = np.logaddexp.accumulate(shares[::-1])[::-1]
    count = among.sum(0)
    is_open = np.arange(len(most))[:, None] < count
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.log(open_mass) - beyond
        fits = (levels + shares <= largest - scale) & is_open
    first = np.where(fits.any(0), fits.argmax(0), np.maximum(count - 1, 0))
    level = np.take_along_axis(levels, first[None], 0)
    spread = np.minimum(most, level + others + scale)
    spread = np.maximum(np.where(total > NEVER, spread, NEVER), NEVER)
    found: Numbers = np.where(among & ~is_within, spread, most)
    return found


def weights(student: np.ndarray, teacher: np.ndarray, alphas: Alphas) -> np.ndarray:
    """s^(1-alpha) t^alpha, [..., rows, alphas]. Both models: [..., rows]."""
    found: np.ndarray = np.exp((1 - alphas) * student[..., None] + alphas * teacher[..., None])
    return found


class Limits:
    """Limits of sums over the ids of a box, of w (constant + slope log(t/s)).

    For alphas inside of (0, 1) and slopes above 0; lemmas 2 and 3.
    """

    def __init__(self, box: Box) -> None:
        self.box = box
        exact = box.exact
        corners = ((box.student, box.teacher), *box.spread)
        student, teacher = (
            _gathered(np.array([corner[model] for corner in corners]), ~exact, NEVER)
            for model in (0, 1)
        )
        known = _gathered(np.array([box.student, box.teacher]), exact, NEVER)
        fixed = _gathered(np.array([box.student_known, box.teacher_known]), ~exact, False)
        self._plain = _Lower((known[0], known[1]), (student, teacher), fixed[1])
        self._exchanged = _Lower((known[1], known[0]), (teacher, student), fixed[0])

    def least(self, alphas: Alphas, constants: Constants, slopes: Constants) -> Sums:
        """Least of a sum."""
        return self._plain.least(alphas, constants, slopes)

    def most(self, alphas: Alphas, constants: Constants, slopes: Constants) -> Sums:
        """Most of it: the least with the roles of the models exchanged, of the negative."""
        return -self._exchanged.least(1 - alphas, -constants, slopes)


class _Lower:
    """What the least of a sum over weights is made of."""

    def __init__(self, exact: Corner, open_ids: Corners, teacher_known: Masks) -> None:
        """`exact`: the ids whose weight is known; `open_ids`: the others."""
        self.exact = exact
        self.student, self.teacher = (each[..., None, None] for each in open_ids)
        self.is_fixed = np.zeros(self.student.shape, bool)
        self.is_fixed[0, ..., 0, 0] = (
            teacher_known  # lemma 3, of the spreads, is not about such ids
        )

    def least(self, alphas: Alphas, constants: Constants, slopes: Constants) -> Sums:
        student, teacher = self.exact
        weight = weights(student, teacher, alphas)
        psi = (weight * (teacher - student)[..., None]).sum(0)
        known = constants * weight.sum(0)[..., None] + slopes * psi[..., None]

        alpha = alphas[..., None]
        cut = self.student - (constants / slopes + 1 / alpha)
        teacher = np.where(self.is_fixed, self.teacher, np.minimum(self.teacher, cut))
        ratio = teacher - self.student
        terms = np.exp(self.student + alpha * ratio) * (constants + slopes * ratio)
        terms = np.where(self.is_fixed, np.minimum(terms, 0.0), terms)
        least: Sums = known + terms.sum(1).max(0)
        return least


def _gathered(kinds: np.ndarray, among: Masks, default: float) -> np.ndarray:
    """Of [kinds, columns, rows] the columns of every row that are `among`, then the default."""
    count = among.sum(0)
    order = (~among).argsort(0, kind="stable")[: count.max(initial=0)]
    found = np.take_along_axis(kinds, order[None], 1)
    return np.where(np.arange(len(order))[:, None] < count, found, default)
