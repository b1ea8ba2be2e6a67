"""A pair over a small vocabulary on a CPU: whole arrays in float64, and as few calls as can be.

Every call costs a microsecond, which at a few hundred tokens is as much as its work. Each row's
sums are taken by themselves, so its bits do not depend on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from numpy.typing import NDArray
from torch import Tensor

from optimal_sampling.distribution.arrays import Array
from optimal_sampling.distribution.pair import MASKED, MASKED_LOGIT, Moments, Pair

__all__ = ["MAX_VOCAB", "WholePair"]

MAX_VOCAB = 4096
"""Largest vocabulary. Wider rows leave the cache, where tiles of float32 are faster."""

_MIN_EXPONENT = -700.0  # exp of less is no normal float64, and slow

_Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class WholeMoments(Moments):
    """With the scores of every token, [rows, vocab], and their exponentials."""

    score: _Numbers
    weight: _Numbers
    """exp(score), relative to the row's largest where that could underflow."""
    total: _Numbers
    """Sum of the weights; `log_sum` is its log."""

    @property
    def entropy(self) -> Array:
        """H(q)."""
        mean_score: Array = np.vecdot(self.weight, self.score) / self.total
        return self.log_sum - mean_score

    def draw(self, noise: Float32[Tensor, "rows vocab"]) -> tuple[Int64[Tensor, " rows"], Array]:
        """argmax(log q + noise) and its log q."""
        noisy = noise.numpy().astype(np.float64)
        noisy += self.score
        token = noisy.argmax(-1)
        drawn = self.score[np.arange(len(token)), token]
        return torch.from_numpy(token), drawn - self.log_sum

    def log_q(self) -> Float32[Tensor, "rows vocab"]:
        """The normalised mixture."""
        log_q = torch.from_numpy(self.score - self.log_sum[:, None])
        log_q.masked_fill_(log_q < MASKED, -torch.inf)
        return log_q.to(torch.float32)


class WholePair(Pair):
    """A pair of float64 arrays, [2, rows, vocab]."""

    def _load(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        self._logits = [_array(student_logits), _array(teacher_logits)]
        self._temperature = temperature
        self._both = np.empty((2, self.rows, self.vocab))
        self._both[0] = self._logits[0]
        self._both[1] = self._logits[1]
        if temperature != 1:
            self._both *= 1 / temperature
        self._models = torch.from_numpy(self._both)
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
        self._underflows = self.rows > 0 and bool((self._least - top).min() < _MIN_EXPONENT)
        self._weights = self._exp(self._both)
        self._z = np.add.reduce(self._weights, -1)
        log_z = np.log(self._z)
        offset = top + log_z
        self.log_z = (log_z[0], log_z[1])
        self.offset = (offset[0], offset[1])

    def _exp(self, x: _Numbers) -> _Numbers:
        return np.exp(np.maximum(x, _MIN_EXPONENT)) if self._underflows else np.exp(x)

    def _prepare(self) -> None:
        super()._prepare()
        self._student = self._both[0]
        self._d = self._both[1] - self._student
        self._d2 = self._d * self._d

    def _moments(self, alpha: Array, changed: Array) -> Moments:
        score = cast(_Numbers, alpha[:, None] * self._d)
        score += self._student
        top: Any = 0.0
        if self._underflows:
            top = np.maximum.reduce(score, -1)
            score -= top[:, None]
        weight = self._exp(score)
        weighted_d = weight * self._d
        total = np.add.reduce(weight, -1)
        mean = np.vecdot(weight, self._d) / total
        square = mean * mean
        variance = np.vecdot(weight, self._d2) / total - square
        log_sum = np.log(total)
        return WholeMoments(
            alpha=alpha,
            F=log_sum + top - self.log_z[0] - alpha * self.gap,
            slope=mean - self.gap,
            curvature=variance,
            third=np.vecdot(weighted_d, self._d2) / total - mean * (3 * variance + square),
            log_sum=log_sum,
            score=score,
            weight=weight,
            total=total,
        )

    def partitions(self, beta: Array, other: Array) -> tuple[Array, Array]:
        """F(beta) and F(other)."""
        betas = np.array([beta, other])
        known = ((betas == 0) | (betas == 1)) & ~(self.student_misses | self.teacher_misses)
        if known.all():
            return 0 * beta, 0 * other
        score = betas[:, :, None] * self._d
        score += self._student
        top = np.maximum.reduce(score, -1)
        score -= top[:, :, None]
        np.maximum(score, _MIN_EXPONENT, out=score)
        total = np.add.reduce(np.exp(score, out=score), -1)
        F = np.where(known, 0.0, np.log(total) + top - self.log_z[0] - betas * self.gap)
        return F[0], F[1]

    def ess(self, at: Moments) -> Array:
        """Both ESS; with p_student and p_teacher in memory, by a division."""
        if not isinstance(at, WholeMoments):
            return super().ess(at)
        squares = np.empty((2, self.rows))
        for p, square in zip(self._weights, squares, strict=True):
            np.vecdot(at.weight, at.weight / p, out=square)
        squares *= self._z
        return 1 / np.maximum(squares / (at.total * at.total), 1.0)

    def token_log_p(self, token: Int64[Tensor, " rows"]) -> tuple[Array, Array]:
        """log p of tokens under student and teacher."""
        ids = token.numpy()
        rows = np.arange(self.rows)
        student, teacher = (
            logits[rows, ids].astype(np.float64) / self._temperature for logits in self._logits
        )
        return student - self.offset[0], teacher - self.offset[1]


def _array(logits: Tensor) -> Float[np.ndarray, "rows vocab"]:
    """The same memory where NumPy knows its type."""
    array: Float[np.ndarray, "rows vocab"] = (
        logits.float() if logits.dtype == torch.bfloat16 else logits
    ).numpy()
    return array
