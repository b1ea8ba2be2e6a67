"""Student and teacher over one batch of positions, and the moments of their mixtures.

With p_student and p_teacher on their common support, d = log p_teacher - log p_student and

    F(alpha) = log sum p_student^(1-alpha) p_teacher^alpha,

F'(alpha) = E_q[d] = KL(q||p_student) - KL(q||p_teacher) and F''(alpha) = Var_q[d]. Knows nothing of how alpha is
chosen or a token is drawn.

Two classes take the sums: `direct.DirectPair` on whole arrays in float64, `tiled.TiledPair` in float32 tiles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from optimal_sampling.distribution.support import keep_largest
from optimal_sampling.distribution.tiles import (
    FLOOR,
    Rows,
    at_least,
    namespace,
    rows_of,
    stack,
    tensor_of,
)

__all__ = ["Moments", "Pair"]


@dataclass(frozen=True, slots=True)
class Moments:
    """Of the mixture q at one alpha per row; nats, float64."""

    alpha: Rows
    F: Rows
    """log of the sum of p_student^(1-alpha) p_teacher^alpha; at most 0 for alpha in [0, 1]."""
    slope: Rows
    """F' = E_q[d] = KL(q||p_student) - KL(q||p_teacher)."""
    curvature: Rows
    """F'' = Var_q[d]."""
    third: Rows
    """F''' = E_q[(d - F')^3]."""

    @property
    def kl_student(self) -> Rows:
        """KL(q||p_student)."""
        return self.alpha * self.slope - self.F

    @property
    def kl_teacher(self) -> Rows:
        """KL(q||p_teacher)."""
        return (self.alpha - 1) * self.slope - self.F


class Pair(ABC):
    """Two rows of logits per position, as they are used: divided by the temperature, restricted, normalised.

    Kept shifted by their largest value, with log Z beside them. Where supports differ, both are cut to the common
    one, on which q lives for 0 < alpha < 1; `restore` brings one model back whole for alpha = 0 or 1.
    """

    models: Float[Tensor, "2 rows vocab"]
    """Student and teacher; FLOOR or less stands for -inf."""
    largest: Rows
    """[2, rows], of `models`."""
    no_student: Rows
    """Whether the student has none of the teacher's support."""
    log_z: tuple[Rows, Rows]
    offset: tuple[Rows, Rows]
    """log p of a token is its logit, divided by the temperature, less this."""
    floored: Rows
    """Whether any logit of the row is -inf."""

    def __init__(
        self,
        student_logits: Float[Tensor, "rows vocab"],
        teacher_logits: Float[Tensor, "rows vocab"],
        temperature: float = 1.0,
        support_top_k: int = -1,
        support_top_p: float = 1.0,
    ) -> None:
        self.rows, self.vocab = student_logits.shape
        self.device = student_logits.device
        self.xp = namespace(self.device)
        self.on_cpu = self.xp is np
        self._load(student_logits, teacher_logits, temperature)
        self._find_bad()
        if support_top_k > 0 or support_top_p < 1:
            keep = keep_largest(self.models[1].to(torch.float32), support_top_k, support_top_p)
            self.models.masked_fill_(~keep, FLOOR)
            self._measure()
        self._normalise()
        self._meet()
        self._prepare()
        self.passes = self.full(0.0)
        """Passes over the vocabulary that each row has cost, those for normalising not counted (CPU only)."""
        self._last: Moments | None = None

    def full(self, value: float) -> Rows:
        """The same number for every row."""
        if self.on_cpu:
            return self.xp.full(self.rows, value)
        return torch.full((self.rows,), value, dtype=torch.float64, device=self.device)

    def none(self, flags: Rows) -> bool:
        """True where it is known that no flag is set. An accelerator is not waited for."""
        return self.on_cpu and not flags.any()

    def _find_bad(self) -> None:
        """Rows that are no distribution become harmless: the two models agree on them."""
        bad = ~((self.largest > FLOOR / 2) & (self.largest < float("inf")))  # true for NaN
        self.bad_student, self.bad_teacher = bad
        self.bad = self.bad_student | self.bad_teacher
        if not self.none(self.bad):
            self.models.masked_fill_(tensor_of(self.bad)[:, None], 0.0)
            self._measure()

    def _meet(self) -> None:
        """Cut both models to their common support."""
        self.student_misses = self.teacher_misses = self.disjoint = self.use_student = (
            self.use_teacher
        ) = self.bad & False
        if self.none(self.floored):
            return
        has_student, has_teacher = self.models > FLOOR / 2
        common = has_student & has_teacher
        self.student_misses = rows_of((has_teacher & ~has_student).any(-1))
        self.teacher_misses = rows_of((has_student & ~has_teacher).any(-1))
        self.disjoint = rows_of(~common.any(-1))
        self._whole = self.models.clone()
        self.models.masked_fill_(~common, FLOOR)
        self.models.masked_fill_(tensor_of(self.disjoint)[:, None], 0.0)  # harmless until `restore`

    def restore(self, alpha: Rows) -> None:
        """Give the rows with alpha = 1 the teacher's whole support, and those with alpha = 0 the student's."""
        if self.none(self.floored):
            return
        self.use_teacher = (alpha == 1) & (self.student_misses | self.disjoint)
        self.use_student = (alpha == 0) & (self.teacher_misses | self.disjoint)
        where, (student_z, teacher_z) = self.xp.where, self.log_z
        for use, model in ((self.use_student, 0), (self.use_teacher, 1)):
            self.models.copy_(torch.where(tensor_of(use)[:, None], self._whole[model], self.models))
        self.log_z = (
            where(self.use_teacher, teacher_z, student_z),
            where(self.use_student, student_z, teacher_z),
        )
        self._last = None
        self._prepare()

    def moments(self, alpha: Rows) -> Moments:
        """One pass over the vocabulary, for the rows whose alpha is not that of the call before.

        alpha is rounded to float32, in which it is reported.
        """
        xp = self.xp
        alpha = xp.asarray(xp.asarray(alpha, dtype=xp.float32), dtype=xp.float64)
        changed = self.bad | True if self._last is None else alpha != self._last.alpha
        if self._last is not None and self.none(changed):
            return self._last
        self.passes = self.passes + changed
        self._last = self._moments(alpha, changed)
        return self._last

    @abstractmethod
    def _load(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        """Copy into `models`, divide by the temperature, floor; `_measure`."""

    @abstractmethod
    def _measure(self) -> None:
        """`largest`: [2, rows], after a change of `models`."""

    @abstractmethod
    def _normalise(self) -> None:
        """Shift `models` by the largest; log_z, offset, floored, no_student."""

    def _prepare(self) -> None:
        """Called when `models` has its last form, again after `restore`."""
        self.gap = self.log_z[1] - self.log_z[0]  # d = teacher - student - gap

    @abstractmethod
    def _moments(self, alpha: Rows, changed: Rows) -> Moments: ...

    @abstractmethod
    def partitions(self, beta: Rows, other: Rows) -> tuple[Rows, Rows]:
        """F(beta) and F(other), for any real numbers; 0 at 0 and at 1 on a common support, without a sweep."""

    def ess(self, at: Moments) -> Rows:
        """[2, rows]: 1 / sum q^2/p_student and 1 / sum q^2/p_teacher. The first sum is exp(F(2 alpha) - 2 F(alpha))."""
        partitions = stack(list(self.partitions(2 * at.alpha, 2 * at.alpha - 1)))
        return 1 / at_least(self.xp.exp(partitions - 2 * at.F), 1.0)

    @abstractmethod
    def entropy(self) -> Rows:
        """H(q) at the alpha of the last `moments`."""

    @abstractmethod
    def draw(self, noise: Float32[Tensor, "rows vocab"]) -> tuple[Int64[Tensor, " rows"], Rows]:
        """argmax(log q + noise) at the alpha of the last `moments`, the first of equals, and its log q."""

    @abstractmethod
    def log_q(self) -> Float32[Tensor, "rows vocab"]:
        """The normalised mixture at the alpha of the last `moments`, -inf where it is 0."""

    @abstractmethod
    def token_log_p(self, token: Int64[Tensor, " rows"]) -> tuple[Rows, Rows]:
        """log p of tokens under student and teacher, as restricted to the teacher's support."""
