"""Student and teacher over one batch of positions, and the moments of their mixtures.

With p_student and p_teacher on their common support, d = log p_teacher - log p_student and

    F(alpha) = log sum p_student^(1-alpha) p_teacher^alpha,

F'(alpha) = E_q[d] = KL(q||p_student) - KL(q||p_teacher) and F''(alpha) = Var_q[d].

Two classes take the sums: `cpu.whole.WholePair` and `cpu.tiled.TiledPair`. `SingleModel` is one
model alone, in the same form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import (
    Array,
    Flags,
    Logits,
    Scores,
    Tokens,
    argmax,
    array_of,
    at_least,
    at_most,
    check_shapes,
    cuts,
    fill_rows,
    full,
    keep_largest,
    keep_likely,
    namespace,
    stack,
    tensor_of,
    to_float32,
    uses_numpy,
    values_of,
)

__all__ = ["MASKED", "MASKED_LOGIT", "Moments", "Pair", "SingleModel", "teacher_support"]

MASKED_LOGIT = -1e18
"""Stands for -inf: differences and their squares are finite, and its exponential is 0."""

MASKED = MASKED_LOGIT / 2
"""A logit below this one counts as -inf."""


def teacher_support(teacher: Scores, mixture: MixtureConfig) -> Bool[Tensor, "rows vocab"] | None:
    """The tokens that both models are restricted to; None: all.

    `teacher` holds log-probabilities at the run's temperature, up to a constant per row.
    """
    if not mixture.has_support:
        return None
    top_k = mixture.teacher_support_top_k
    top_p = mixture.teacher_support_top_p
    min_p = mixture.support_min_p
    keep = keep_likely(teacher, min_p) if min_p > 0 else None
    if cuts(top_k, top_p):
        ranked = keep_largest(teacher, top_k, top_p)
        keep = ranked if keep is None else keep & ranked
    return keep


@dataclass(slots=True, eq=False)
class Moments(ABC):
    """The mixture q at one alpha per row; nats, float64. Never changed; `frozen` would cost 3%."""

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
    def left_out(self) -> Array | float:
        """Mass of p_student on tokens in whose place q draws one of the teacher's."""
        return 0.0

    def token_log_q(self, token: Tokens) -> Array | None:
        """log q of tokens; None: it follows from alpha."""
        return None

    @property
    @abstractmethod
    def entropy(self) -> Array:
        """H(q) = log_sum - E_q[score]."""

    @abstractmethod
    def draw(self, noise: Scores) -> tuple[Tokens, Array]:
        """argmax(log q + noise), the first of equals, and its log q."""

    @abstractmethod
    def log_q(self) -> Scores:
        """The normalised mixture, -inf where it is 0; a new tensor."""

    def renormalise(self, scores: Scores) -> Scores:
        """Log-probabilities from those of `log_q` that truncation has left; in place."""
        log_sum = scores.to(torch.float64).logsumexp(-1, keepdim=True)
        return scores.sub_(log_sum)


class Pair(ABC):
    """Two rows of logits per position: divided by the temperature, restricted, normalised.

    Kept shifted by their largest value, with log Z beside them. Where supports differ, both are cut
    to the common one, on which q lives for 0 < alpha < 1; `restore_support` brings one model back
    whole for alpha = 0 or 1.
    """

    largest: Array
    """[2, rows], of `models`."""
    no_student: Flags
    """Whether the student has none of the teacher's support."""
    log_mass: tuple[Array, Array] | None = None
    """log p_student(S) and log p_teacher(S), with S the teacher's support; None: there is none."""
    log_z: tuple[Array, Array]
    offset: tuple[Array, Array]
    """log p of a token is its logit, divided by the temperature, less this."""
    maybe_masked: bool
    """False where it is known that no logit is -inf."""
    gap: Array
    """log Z of the teacher less the student's: d = teacher - student - gap."""

    def __init__(
        self,
        student_logits: Logits,
        teacher_logits: Logits,
        mixture: MixtureConfig,
        support: Bool[Tensor, "rows vocab"] | None = None,
    ) -> None:
        check_shapes(student_logits, teacher_logits)
        self.rows, self.vocab = student_logits.shape
        self.device = student_logits.device
        self.xp = namespace(self.device)
        self.on_cpu = uses_numpy(self.device)
        self.mixture = mixture
        self.temperature = mixture.temperature
        self._solved = False
        self._last: Moments | None = None
        self._load(student_logits, teacher_logits)
        self._neutralise_bad()
        self._normalise()
        if support is None:
            # of shifted logits: float32 keeps the digits of what lies near the largest
            support = teacher_support(self.models[1].to(torch.float32), mixture)
        if support is not None:
            self._restrict(support)
        self._intersect_supports()
        self._prepare()

    def full(self, value: float) -> Array:
        """The same number for every row."""
        return full(self.rows, value, self.device)

    def none(self, flags: Flags) -> bool:
        """True where it is known that no flag is set. An accelerator is not waited for."""
        return self.on_cpu and not flags.any()

    def _neutralise_bad(self) -> None:
        """Make both models agree on rows that are no distribution."""
        good = (self.largest > MASKED) & (self.largest < float("inf"))  # false for NaN
        self.bad_student, self.bad_teacher = ~good
        self.bad = self.bad_student | self.bad_teacher
        self.maybe_bad = not self.none(self.bad)
        if self.maybe_bad:
            fill_rows(self.models, self.bad, 0.0)
            self._measure()

    def _restrict(self, keep: Bool[Tensor, "rows vocab"]) -> None:
        """Cut both models to the teacher's support; notes their mass there."""
        before = self.offset
        self.models.masked_fill_(~keep, MASKED_LOGIT)
        self._measure()
        self._normalise()
        student, teacher = (
            at_most(part - whole, 0.0) for part, whole in zip(self.offset, before, strict=True)
        )
        self.log_mass = (self.xp.where(self.no_student, -float("inf"), student), teacher)

    def _intersect_supports(self) -> None:
        """Find where supports differ, and cut both models of a geometric mixture to the common."""
        nowhere = self.bad & False
        self.student_misses = self.teacher_misses = self.disjoint = nowhere
        self.use_student = self.use_teacher = nowhere
        self._uncut: Tensor | None = None
        if not self.maybe_masked:
            return
        has_student, has_teacher = self.models > MASKED
        common = has_student & has_teacher
        only_student = has_student & ~has_teacher
        only_teacher = has_teacher & ~has_student
        self.student_misses = array_of(only_teacher.any(-1))
        self.teacher_misses = array_of(only_student.any(-1))
        self.disjoint = array_of(~common.any(-1))
        if not self.mixture.is_geometric or self.none(self.student_misses | self.teacher_misses):
            return
        self._uncut = self.models.clone()
        self.models.masked_fill_(~common, MASKED_LOGIT)
        # equal models until `restore_support`
        fill_rows(self.models, self.disjoint, 0.0)

    def restore_support(self, alpha: Array) -> None:
        """Give rows with alpha = 1 the teacher's whole support, those with alpha = 0 the student's.

        Once per pair: RuntimeError the second time.
        """
        if self._solved:
            raise RuntimeError("this pair is solved already; make another one")
        self._solved = True
        if self._uncut is None:
            return
        self.use_teacher = (alpha == 1) & (self.student_misses | self.disjoint)
        self.use_student = (alpha == 0) & (self.teacher_misses | self.disjoint)
        student, teacher = self._uncut
        for use, whole in ((self.use_student, student), (self.use_teacher, teacher)):
            rows = tensor_of(use)[:, None]
            self.models.copy_(torch.where(rows, whole, self.models))
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
        alpha = to_float32(alpha, self.xp)
        last = self._last
        if last is None:
            changed = self.bad | True
        else:
            changed = alpha != last.alpha
            if self.none(changed):
                return last
        self._last = self._moments(alpha, changed)
        return self._last

    def partitions(self, beta: Array, other: Array) -> Array:
        """[2, rows]: F(beta) and F(other), for any numbers; 0 at 0 and at 1 on a common support."""
        betas = stack([beta, other])
        uneven = self.student_misses | self.teacher_misses
        known = ((betas == 0) | (betas == 1)) & ~uneven
        log_sums = self._log_sums(betas, known)
        F = log_sums - self.log_z[0] - betas * self.gap
        return self.xp.where(known, 0.0, F)

    def ess(self, at: Moments) -> Array:
        """[2, rows]: 1 / sum q^2/p_student and 1 / sum q^2/p_teacher.

        The sums are exp(F(2 alpha) - 2 F(alpha)) and exp(F(2 alpha - 1) - 2 F(alpha)).
        """
        doubled = 2 * at.alpha
        partitions = self.partitions(doubled, doubled - 1)
        squares = self.xp.exp(partitions - 2 * at.F)
        return 1 / at_least(squares, 1.0)

    def token_log_p(self, token: Tokens) -> tuple[Array, Array]:
        """log p of tokens under student and teacher, as restricted to the teacher's support.

        -inf where the student has none of it.
        """
        student, teacher = self._logits_of(token)
        student_offset, teacher_offset = self.offset
        return (
            student / self.temperature - student_offset,
            teacher / self.temperature - teacher_offset,
        )

    def _derivatives(
        self, alpha: Array, log_sum: Array, means: Sequence[Array]
    ) -> tuple[Array, Array, Array, Array, Array]:
        """The first fields of Moments. `means`: of (d + gap), its square and its cube, under q."""
        mean, second, third = means
        square = mean * mean
        variance = second - square
        F = log_sum - self.log_z[0] - alpha * self.gap
        skew = third - mean * (3 * variance + square)
        return alpha, F, mean - self.gap, variance, skew

    def _prepare(self) -> None:
        """Set what follows from `models`; called again after `restore_support`."""
        self.gap = self.log_z[1] - self.log_z[0]

    @property
    @abstractmethod
    def models(self) -> Float[Tensor, "2 rows vocab"]:
        """Student and teacher; MASKED_LOGIT or less stands for -inf."""

    @abstractmethod
    def _load(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Copy into `models`, divide by the temperature; `_measure`."""

    @abstractmethod
    def _measure(self) -> None:
        """Set `largest`, after a change of `models`."""

    @abstractmethod
    def _normalise(self) -> None:
        """Shift `models` by the largest; set log_z, offset, maybe_masked, no_student."""

    @abstractmethod
    def _moments(self, alpha: Array, changed: Flags) -> Moments: ...

    @abstractmethod
    def _log_sums(self, betas: Array, known: Flags) -> Array:
        """[2, rows]: log of the sum of exp(score) at both betas; anything where `known`."""

    @abstractmethod
    def _logits_of(self, token: Tokens) -> list[Array]:
        """The logits of tokens as they were given, of the student and of the teacher."""


@dataclass(slots=True, eq=False)
class SingleMoments(Moments):
    """alpha is 0 or 1; what takes two models is NaN."""

    log_p: Scores

    @property
    def left_out(self) -> Array:
        """Not known: it takes two models."""
        return self.F

    @property
    def entropy(self) -> Array:
        """Not taken: it would cost a pass."""
        return self.F

    def draw(self, noise: Scores) -> tuple[Tokens, Array]:
        """argmax(log p + noise) and its log p."""
        token = argmax(self.log_p + noise)
        return token, values_of(self.log_p, token)

    def log_q(self) -> Scores:
        """A copy of log p."""
        return self.log_p.clone()

    def renormalise(self, scores: Scores) -> Scores:
        """Log-probabilities of what truncation has left."""
        return scores.log_softmax(-1)


class SingleModel:
    """A model's log-probabilities, [rows, vocab], and which rows are bad."""

    log_mass: tuple[Array, Array] | None = None

    def __init__(self, logits: Logits, temperature: float, role: str) -> None:
        if role not in ("student", "teacher"):
            raise ValueError(f"role must be 'student' or 'teacher', not {role!r}")
        self.device = logits.device
        self.xp = namespace(self.device)
        self.vocab = logits.shape[1]
        scaled = logits.to(torch.float32)
        if temperature != 1:
            # shifted first, which keeps the digits of what lies near the largest
            scaled = (scaled - scaled.amax(-1, keepdim=True)) / temperature
        log_p = scaled.log_softmax(-1)
        self.is_teacher = role == "teacher"
        bad = log_p[:, 0].isnan()  # then all of the row are
        self.bad = array_of(bad)
        nowhere = self.bad & False
        self.bad_student = nowhere if self.is_teacher else self.bad
        self.bad_teacher = self.bad if self.is_teacher else nowhere
        self.use_student = self.use_teacher = nowhere
        self.maybe_bad = not uses_numpy(self.device) or bool(bad.any())
        self.maybe_masked = False
        alpha = self.full(float(self.is_teacher))
        unknown = self.full(float("nan"))
        self.moments = SingleMoments(alpha, unknown, unknown, unknown, unknown, unknown, log_p)

    def full(self, value: float) -> Array:
        """The same number for every row."""
        return full(len(self.bad), value, self.device)

    def token_log_p(self, token: Tokens) -> tuple[Array, Array]:
        """log p of tokens under student and teacher; NaN for the model that is not given."""
        log_p = values_of(self.moments.log_p, token)
        unknown = self.moments.F
        return (unknown, log_p) if self.is_teacher else (log_p, unknown)
