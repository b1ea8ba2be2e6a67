"""All pairs of distributions that have two given lists, and limits of sums over their weights.

The proof is in docs/servers.md, whose numbers the comments give. Notation there: s and t are the
models, w = s^(1-alpha) t^alpha, psi = w log(t/s).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float64

from optimal_sampling.engines.servers.union import NEVER, Side, Support, Union, log_sum

__all__ = [
    "Alphas",
    "Box",
    "Flags",
    "Numbers",
    "Range",
    "Table",
    "box_of",
    "least_sum",
    "most_sum",
    "weights",
]

Numbers: TypeAlias = Float64[np.ndarray, " columns"]
Flags: TypeAlias = Bool[np.ndarray, " columns"]
Table: TypeAlias = Float64[np.ndarray, "rows columns"]
Alphas: TypeAlias = Float64[np.ndarray, " alphas"]
Sums: TypeAlias = Float64[np.ndarray, "alphas terms"]
Terms: TypeAlias = Float64[np.ndarray, "alphas terms columns"]
Range: TypeAlias = tuple[float, float]
Corner: TypeAlias = tuple[Numbers, Numbers]
"""log s and log t."""


@dataclass(frozen=True, slots=True, eq=False)
class Box:
    """Limits of every id's log s and log t.

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
    spread: tuple[Corner, Corner]
    """What the ids that are not known have where the mass outside of a list is spread so that sums
    of weights are largest; lemma 3. The last column is one of the ids that share the teacher's mass
    in the first, and of those that share the student's in the second."""
    student_total: Range
    """Bounds on the log of the student's mass in the support."""
    teacher_total: Range

    @property
    def exact(self) -> Flags:
        """Ids whose weight is known."""
        exact: Flags = self.student_known & self.teacher_known & self.certain
        return exact

    def exact_at(self, low: float, high: float) -> Flags:
        """Ids whose weight is known for alpha in [low, high]; at 0 or 1 that of one model."""
        exact = self.exact
        if low == high == 0:
            exact = self.student_known & self.certain
        if low == high == 1:
            exact = self.teacher_known & self.certain
        return exact

    @property
    def exchanged(self) -> Box:
        """With the student in the teacher's place and the teacher in the student's."""
        first, second = ((teacher, student) for student, teacher in self.spread)
        return replace(
            self,
            student=self.teacher,
            teacher=self.student,
            student_known=self.teacher_known,
            teacher_known=self.student_known,
            spread=(first, second),
            student_total=self.teacher_total,
            teacher_total=self.student_total,
        )

    @property
    def log_ratio(self) -> Range:
        """Bounds on log s(S) - log t(S)."""
        low = self.student_total[0] - self.teacher_total[1]
        return low, self.student_total[1] - self.teacher_total[0]


def box_of(union: Union, support: Support | None) -> Box:
    """What two lists, and the teacher's support where there is one, leave open."""
    student, teacher = union.student, union.teacher
    everywhere = np.ones(len(union.ids), dtype=bool)
    possible = everywhere if support is None else support.possible
    reaches = support is None or support.rest > NEVER
    left = (student.rest[1], teacher.rest[1] if support is None else support.rest)
    outside = (NEVER, NEVER) if union.is_whole or not reaches else left
    never = np.append(~possible, False)  # no weight, which is known
    certain = everywhere if support is None else support.certain
    totals = (student.total, teacher.total)
    if support is not None:
        totals = (_student_total(student, support), _teacher_total(teacher, support))
    most = (
        np.append(np.where(possible, student.log_p, NEVER), outside[0]),
        np.append(np.where(possible, teacher.log_p, NEVER), outside[1]),
    )
    known = (np.append(student.known, False) | never, np.append(teacher.known, False) | never)
    box = Box(
        student=most[0],
        teacher=most[1],
        student_known=known[0],
        teacher_known=known[1],
        certain=np.append(certain, False) | never,
        drawn=np.append(possible & (teacher.known | (support is None)), False),
        spread=(_spread(most, known, left, with_tail=1), _spread(most, known, left, with_tail=0)),
        student_total=totals[0],
        teacher_total=totals[1],
    )
    return _scaled(box)


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
    low = log_sum(student.log_p[support.certain & student.known])
    high = log_sum(student.log_p[support.possible & student.known])
    unknown = student.log_p[support.possible & ~student.known]
    rest = student.rest[1] if support.rest > NEVER else min(student.rest[1], log_sum(unknown))
    return low, float(np.logaddexp(high, rest))


def _teacher_total(teacher: Side, support: Support) -> Range:
    known = log_sum(teacher.log_p[support.possible & teacher.known])
    return support.least_mass, float(np.logaddexp(known, support.rest))


def _spread(most: Corner, known: tuple[Flags, Flags], left: Range, with_tail: int) -> Corner:
    """The masses outside of both lists, spread; the tail is one of those of model `with_tail`."""
    spread = []
    for model in (0, 1):
        open_ids = ~known[model]
        open_ids[-1] = model == with_tail
        values = most[model].copy()
        others = most[1 - model][open_ids]
        values[open_ids] = _in_proportion(values[open_ids], others, left[model])
        spread.append(values)
    return spread[0], spread[1]


def _in_proportion(most: Numbers, others: Numbers, total: float) -> Numbers:
    """Logs of numbers in proportion to `others`, but at most `most`, with a given sum at most."""
    if log_sum(most) <= total:
        return most
    if total <= NEVER:
        return np.full(len(most), NEVER)
    order = np.argsort(most - others)  # the first to be at their most
    caps = np.exp(most[order] - total)
    left = np.maximum(1 - np.cumsum(caps) + caps, 0)
    with np.errstate(divide="ignore"):
        levels = np.log(left) - np.logaddexp.accumulate(others[order][::-1])[::-1]
    fits = levels + others[order] <= most[order] - total
    level = levels[np.argmax(fits)] if fits.any() else levels[-1]
    spread: Numbers = np.maximum(np.minimum(most, level + others + total), NEVER)
    return spread


def weights(student: Numbers | Table, teacher: Numbers | Table, alphas: Alphas) -> Table:
    """s^(1-alpha) t^alpha."""
    column = alphas[:, None]
    found: Table = np.exp((1 - column) * student + column * teacher)
    return found


def least_sum(box: Box, alphas: Alphas, constants: Alphas, slopes: Alphas) -> Sums:
    """Least of the sum of w (constant + slope log(t/s)), for alphas inside of (0, 1) and slopes
    above 0; lemmas 2 and 3.
    """
    alpha, constant, slope = alphas[:, None, None], constants[:, None], slopes[:, None]

    def terms(student: Numbers, teacher: Numbers | Terms) -> Terms:
        weight = np.exp((1 - alpha) * student + alpha * teacher)
        found: Terms = weight * (constant + slope * (teacher - student))
        return found

    def least(student: Numbers, teacher: Numbers) -> Terms:
        cut = student - constant / slope - 1 / alpha
        return terms(student, np.minimum(teacher, cut))

    exact = box.exact
    known = terms(box.student[exact], box.teacher[exact]).sum(-1)
    open_ids = ~exact
    corner = box.student[open_ids], box.teacher[open_ids]
    at_most = np.minimum(terms(*corner), 0.0)
    unknown = np.where(box.teacher_known[open_ids], at_most, least(*corner)).sum(-1)
    for student, teacher in box.spread:
        spread = least(student[open_ids], teacher[open_ids]).sum(-1)
        unknown = np.maximum(unknown, spread)
    total: Sums = known + unknown
    return total


def most_sum(box: Box, alphas: Alphas, constants: Alphas, slopes: Alphas) -> Sums:
    """Most of it: the least with the roles of the models exchanged."""
    return -least_sum(box.exchanged, 1 - alphas, -constants, slopes)
