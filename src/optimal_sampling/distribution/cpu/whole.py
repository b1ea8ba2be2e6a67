"""A pair over a small vocabulary on a CPU: whole arrays in float64, and as few calls as can be.

Every call costs a microsecond, which at a few hundred tokens is as much as its work. Each row's
sums are taken by themselves, so its bits do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.distribution.arrays import Array, Flags, Scores, Tokens
from optimal_sampling.distribution.pair import MASKED, MASKED_LOGIT, Moments, Pair

__all__ = ["MAX_VOCAB", "WholePair"]

MAX_VOCAB = 4096
"""Largest vocabulary. Wider rows leave the cache, where tiles of float32 are faster."""

_MIN_EXPONENT = -700.0  # exp of less is no normal float64, and slow


@dataclass(slots=True, eq=False)
class WholeMoments(Moments):
    """With the scores of every token, [rows, vocab], and their exponentials."""

    score: Array
    weight: Array
    """exp(score), relative to the row's largest where that could underflow."""
    total: Array
    """Sum of the weights; `log_sum` is its log."""

    @property
    def entropy(self) -> Array:
        """H(q)."""
        mean_score: Array = np.vecdot(self.weight, self.score) / self.total
        return self.log_sum - mean_score

    def draw(self, noise: Scores) -> tuple[Tokens, Array]:
        """argmax(log q + noise) and its log q."""
        noisy = noise.numpy().astype(np.float64)
        noisy += self.score
        token = noisy.argmax(-1)
        drawn = self.score[np.arange(len(token)), token]
        return torch.from_numpy(token), drawn - self.log_sum

    def log_q(self) -> Scores:
        """The normalised mixture."""
        normalised = self.score - self.log_sum[:, None]
        log_q = torch.from_numpy(normalised)
        log_q.masked_fill_(log_q < MASKED, -torch.inf)
        return log_q.to(torch.float32)


class WholePair(Pair):
    """A pair of float64 arrays, [2, rows, vocab]."""

    _shifted: Flags
    """Rows whose scores are taken relative to their largest: exp of one could underflow."""
    _clamped: Flags
    """Rows where a p that is not 0 is less than exp(_MIN_EXPONENT); set where any underflows."""

    def _load(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        self._logits = [_array(student_logits), _array(teacher_logits)]
        self._both = np.empty((2, self.rows, self.vocab))
        self._both[0], self._both[1] = self._logits
        if self.temperature != 1:
            self._both *= 1 / self.temperature
        self._models = torch.from_numpy(self._both)
        self._origin = np.zeros((2, self.rows))
        self._measure()

    @property
    def models(self) -> Float[Tensor, "2 rows vocab"]:
        """The same memory as a tensor."""
        return self._models

    def _measure(self) -> None:
        self._top = np.maximum.reduce(self._both, -1)
        self._least = np.minimum.reduce(self._both, -1)
        self.largest = self._top

    def _normalise(self) -> None:
        top = self._top
        self.no_student = top[0] < MASKED
        masked = self._least < MASKED
        self.maybe_masked = bool(masked.any())
        if self.maybe_masked:
            np.maximum(self._both, MASKED_LOGIT, out=self._both)
            top = np.where(top < MASKED, 0.0, top)
        self._both -= top[:, :, None]
        self._origin += top
        student, teacher = self._least - top < _MIN_EXPONENT
        self._shifted = student | teacher
        self._underflows = bool(self._shifted.any())
        if self._underflows:
            tiny = (self._both < _MIN_EXPONENT) & (self._both > MASKED)
            self._clamped = np.logical_or.reduce(tiny, (0, 2))
        self._weights = self._exp(self._both)
        self._z = np.add.reduce(self._weights, -1)
        log_z = np.log(self._z)
        self.log_z = tuple(log_z)
        self.offset = tuple(self._origin + log_z)

    def _exp(self, x: Array) -> Array:
        if self._underflows:
            x = np.maximum(x, _MIN_EXPONENT)
        return np.exp(x)

    def _prepare(self) -> None:
        super()._prepare()
        self._student = self._both[0]
        self._d = self._both[1] - self._student
        self._d2 = self._d * self._d

    def _moments(self, alpha: Array, changed: Flags) -> Moments:
        score = alpha[:, None] * self._d
        score += self._student
        top: Any = 0.0
        if self._underflows:
            top = np.where(self._shifted, np.maximum.reduce(score, -1), 0.0)
            score -= top[:, None]
        weight = self._exp(score)
        total = np.add.reduce(weight, -1)
        means = (
            np.vecdot(weight, self._d) / total,
            np.vecdot(weight, self._d2) / total,
            np.vecdot(weight * self._d, self._d2) / total,
        )
        log_sum = np.log(total)
        derivatives = self._derivatives(alpha, log_sum + top, means)
        return WholeMoments(*derivatives, log_sum, score, weight, total)

    def _log_sums(self, betas: Array, known: Flags) -> Array:
        score = betas[:, :, None] * self._d
        score += self._student
        top = np.maximum.reduce(score, -1)
        score -= top[:, :, None]
        np.maximum(score, _MIN_EXPONENT, out=score)
        np.exp(score, out=score)
        total = np.add.reduce(score, -1)
        log_sums: Array = np.log(total) + top
        return log_sums

    def ess(self, at: Moments) -> Array:
        """Both ESS; with p_student and p_teacher in memory, by a division.

        Where a p is clamped the quotient is wrong, and the sums are those of `Pair.ess`.
        """
        at = cast(WholeMoments, at)
        squares = np.empty((2, self.rows))
        for p, square in zip(self._weights, squares, strict=True):
            np.vecdot(at.weight, at.weight / p, out=square)
        squares *= self._z
        squares /= at.total * at.total
        divided: Array = 1 / np.maximum(squares, 1.0)
        if self._underflows and self._clamped.any():
            return np.where(self._clamped, super().ess(at), divided)
        return divided

    def _logits_of(self, token: Tokens) -> list[Array]:
        ids = token.numpy()
        rows = np.arange(self.rows)
        return [logits[rows, ids].astype(np.float64) for logits in self._logits]


def _array(logits: Tensor) -> Float[np.ndarray, "rows vocab"]:
    """The same memory where NumPy knows its type."""
    known = logits.float() if logits.dtype == torch.bfloat16 else logits
    array: Float[np.ndarray, "rows vocab"] = known.numpy()
    return array
