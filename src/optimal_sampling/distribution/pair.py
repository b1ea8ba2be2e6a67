"""Student and teacher over one batch of positions, and the moments of their mixtures.

With p_student and p_teacher on their common support, d = log p_teacher - log p_student and

    F(alpha) = log sum p_student^(1-alpha) p_teacher^alpha,

F'(alpha) = E_q[d] = KL(q||p_student) - KL(q||p_teacher) and F''(alpha) = Var_q[d].

Two classes take the sums: `cpu.whole.WholePair` and `cpu.tiled.TiledPair`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import (
    Array,
    array_of,
    at_least,
    namespace,
    stack,
    tensor_of,
    uses_numpy,
)
from optimal_sampling.distribution.support import keep_largest

__all__ = ["MASKED", "MASKED_LOGIT", "Moments", "Pair"]

MASKED_LOGIT = -1e18
"""Stands for -inf: differences and their squares are finite, and its exponential is 0."""

MASKED = MASKED_LOGIT / 2
"""A logit below this one counts as -inf."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The mixture q at one alpha per row; nats, float64."""

    alpha: Array
    F: Array
    """log of the sum of p_student^(1-alpha) p_teacher^alpha; at most 0 for alpha in [0, 1]."""
    slope: Array
    """F' = E_q[d] = KL(q||p_student) - KL(q||p_teacher)."""
    curvature: Array
    """F'' = Var_q[d]."""
    third: Array
    """F''' = E_q[(d - F')^3]."""
    log_sum: Array
    """log of the sum of exp(score), with score = (1 - alpha) student + alpha teacher."""

    @property
    def kl_student(self) -> Array:
        """KL(q||p_student)."""
        return self.alpha * self.slope - self.F

    @property
    def kl_teacher(self) -> Array:
        """KL(q||p_teacher)."""
        return (self.alpha - 1) * self.slope - self.F

    @property
    def entropy(self) -> Array:
        """H(q) = log_sum - E_q[score]."""
        raise NotImplementedError

    def draw(self, noise: Float32[Tensor, "rows vocab"]) -> tuple[Int64[Tensor, " rows"], Array]:
        """argmax(log q + noise), the first of equals, and its log q."""
        raise NotImplementedError

    def log_q(self) -> Float32[Tensor, "rows vocab"]:
        """The normalised mixture, -inf where it is 0; a new tensor."""
        raise NotImplementedError

    def renormalise(self, scores: Float32[Tensor, "rows vocab"]) -> Float32[Tensor, "rows vocab"]:
        """Log-probabilities from those of `log_q` that truncation has left; in place."""
        scores -= scores.to(torch.float64).logsumexp(-1, keepdim=True)
        return scores


class Pair(ABC):
    """Two rows of logits per position: divided by the temperature, restricted, normalised.

    Kept shifted by their largest value, with log Z beside them. Where supports differ, both are cut
    to the common one, on which q lives for 0 < alpha < 1; `restore_support` brings one model back
    whole for alpha = 0 or 1.
    """

    largest: Array
    """[2, rows], of `models`."""
    no_student: Array
    """Whether the student has none of the teacher's support."""
    log_z: tuple[Array, Array]
    offset: tuple[Array, Array]
    """log p of a token is its logit, divided by the temperature, less this."""
    maybe_masked: bool
    """False where it is known that no logit is -inf."""
    gap: Array
    """log Z of the teacher less the student's: d = teacher - student - gap."""

    def __init__(
        self,
        student_logits: Float[Tensor, "rows vocab"],
        teacher_logits: Float[Tensor, "rows vocab"],
        mixture: MixtureConfig,
    ) -> None:
        self.rows, self.vocab = student_logits.shape
        self.device = student_logits.device
        self.xp = namespace(self.device)
        self.on_cpu = uses_numpy(self.device)
        self._last: Moments | None = None
        self._load(student_logits, teacher_logits, mixture.temperature)
        self._neutralise_bad()
        top_k = mixture.teacher_support_top_k
        top_p = mixture.teacher_support_top_p
        if top_k > 0 or top_p < 1:
            keep = keep_largest(self.models[1].to(torch.float32), top_k, top_p)
            self.models.masked_fill_(~keep, MASKED_LOGIT)
            self._measure()
        self._normalise()
        self._intersect_supports()
        self._prepare()

    @property
    @abstractmethod
    def models(self) -> Float[Tensor, "2 rows vocab"]:
        """Student and teacher; MASKED_LOGIT or less stands for -inf."""

    def full(self, value: float) -> Array:
        """The same number for every row."""
        if self.on_cpu:
            return np.full(self.rows, value)
        return torch.full((self.rows,), value, dtype=torch.float64, device=self.device)

    def none(self, flags: Array) -> bool:
        """True where it is known that no flag is set. An accelerator is not waited for."""
        return self.on_cpu and not flags.any()

    def _neutralise_bad(self) -> None:
        """Make both models agree on rows that are no distribution."""
        bad = ~((self.largest > MASKED) & (self.largest < float("inf")))  # true for NaN
        self.bad_student = bad[0]
        self.bad_teacher = bad[1]
        self.bad = self.bad_student | self.bad_teacher
        self.maybe_bad = not self.none(self.bad)
        if self.maybe_bad:
            self.models.masked_fill_(tensor_of(self.bad)[:, None], 0.0)
            self._measure()

    def _intersect_supports(self) -> None:
        """Cut both models to their common support."""
        nowhere = self.bad & False
        self.student_misses = self.teacher_misses = self.disjoint = nowhere
        self.use_student = self.use_teacher = nowhere
        self._uncut: Tensor | None = None
        if not self.maybe_masked:
            return
        has_student, has_teacher = self.models > MASKED
        common = has_student & has_teacher
        self.student_misses = array_of((has_teacher & ~has_student).any(-1))
        self.teacher_misses = array_of((has_student & ~has_teacher).any(-1))
        self.disjoint = array_of(~common.any(-1))
        self._uncut = self.models.clone()
        self.models.masked_fill_(~common, MASKED_LOGIT)
        # equal models until `restore_support`
        self.models.masked_fill_(tensor_of(self.disjoint)[:, None], 0.0)

    def restore_support(self, alpha: Array) -> None:
        """Give rows with alpha = 1 the teacher's whole support, those with alpha = 0 the student's.

        Once per pair: RuntimeError the second time.
        """
        if not self.maybe_masked:
            return
        if self._uncut is None:
            raise RuntimeError("this pair is solved already; make another one")
        self.use_teacher = (alpha == 1) & (self.student_misses | self.disjoint)
        self.use_student = (alpha == 0) & (self.teacher_misses | self.disjoint)
        for use, whole in zip((self.use_student, self.use_teacher), self._uncut, strict=True):
            self.models.copy_(torch.where(tensor_of(use)[:, None], whole, self.models))
        self._uncut = None
        student_z, teacher_z = self.log_z
        self.log_z = (
            self.xp.where(self.use_teacher, teacher_z, student_z),
            self.xp.where(self.use_student, student_z, teacher_z),
        )
        self._last = None
        self._prepare()

    def moments(self, alpha: Array) -> Moments:
        """One pass over the vocabulary, for the rows whose alpha is not that of the call before.

        alpha is rounded to float32, in which it is reported.
        """
        xp = self.xp
        alpha = xp.asarray(xp.asarray(alpha, dtype=xp.float32), dtype=xp.float64)
        last = self._last
        changed = self.bad | True if last is None else alpha != last.alpha
        if last is not None and self.none(changed):
            return last
        self._last = self._moments(alpha, changed)
        return self._last

    def ess(self, at: Moments) -> Array:
        """[2, rows]: 1 / sum q^2/p_student and 1 / sum q^2/p_teacher.

        The sums are exp(F(2 alpha) - 2 F(alpha)) and exp(F(2 alpha - 1) - 2 F(alpha)).
        """
        partitions = stack(self.partitions(2 * at.alpha, 2 * at.alpha - 1))
        return 1 / at_least(self.xp.exp(partitions - 2 * at.F), 1.0)

    @abstractmethod
    def _load(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        """Copy into `models`, divide by the temperature; `_measure`."""

    @abstractmethod
    def _measure(self) -> None:
        """Set `largest`, after a change of `models`."""

    @abstractmethod
    def _normalise(self) -> None:
        """Shift `models` by the largest; set log_z, offset, maybe_masked, no_student."""

    def _prepare(self) -> None:
        """Set what follows from `models`; called again after `restore_support`."""
        self.gap = self.log_z[1] - self.log_z[0]

    @abstractmethod
    def _moments(self, alpha: Array, changed: Array) -> Moments: ...

    @abstractmethod
    def partitions(self, beta: Array, other: Array) -> tuple[Array, Array]:
        """F(beta) and F(other), for any real numbers; 0 at 0 and at 1 on a common support."""

    @abstractmethod
    def token_log_p(self, token: Int64[Tensor, " rows"]) -> tuple[Array, Array]:
        """log p of tokens under student and teacher, as restricted to the teacher's support."""
