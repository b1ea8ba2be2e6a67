"""A pair over a small vocabulary on a CPU: whole arrays in float64, and as few calls as can be.

Every call costs a microsecond, which at a few hundred tokens is as much as its work. Each row's sums are taken by
themselves, so its bits do not depend on the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from optimal_sampling.distribution.pair import Moments, Pair
from optimal_sampling.distribution.tiles import FLOOR, Rows

__all__ = ["WIDEST", "DirectPair"]

WIDEST = 4096
"""Largest vocabulary. Wider rows leave the cache, where tiles of float32 are faster."""

_LEAST = -700.0  # exp of less is no normal float64, and slow


class DirectPair(Pair):
    """See `Pair`."""

    def _load(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> None:
        self._logits = [_array(student_logits), _array(teacher_logits)]
        self._temperature = temperature
        self._both = np.empty((2, self.rows, self.vocab))
        self._both[0], self._both[1] = self._logits
        if temperature != 1:
            self._both *= 1 / temperature
        self.models = torch.from_numpy(self._both)
        self._measure()

    def _measure(self) -> None:
        self.largest = np.maximum.reduce(self._both, -1)
        self._least = np.minimum.reduce(self._both, -1)

    def _normalise(self) -> None:
        top = self.largest
        self.no_student = top[0] < FLOOR / 2  # a student without the teacher's support
        floored = self._least < FLOOR / 2
        self.floored = floored[0] | floored[1]
        if not self.none(self.floored):
            np.maximum(self._both, FLOOR, out=self._both)
            top = np.where(top < FLOOR / 2, 0.0, top)
        self._both -= top[:, :, None]
        self._deep = self.rows > 0 and bool((self._least - top).min() < _LEAST)
        self._weights = self._exp(self._both)
        self._z = np.add.reduce(self._weights, -1)
        log_z = np.log(self._z)
        offset = top + log_z
        self.log_z, self.offset = (log_z[0], log_z[1]), (offset[0], offset[1])

    def _exp(self, x: Rows) -> Rows:
        return np.exp(np.maximum(x, _LEAST)) if self._deep else np.exp(x)

    def _prepare(self) -> None:
        super()._prepare()
        self._student = self._both[0]
        self._d = self._both[1] - self._student
        self._d2 = self._d * self._d

    def _moments(self, alpha: Rows, changed: Rows) -> Moments:
        """x = (1-alpha) student + alpha teacher and w = exp(x), relative to the largest where that could underflow."""
        x = alpha[:, None] * self._d
        x += self._student
        top: Rows = 0.0
        if self._deep:
            top = np.maximum.reduce(x, -1)
            x -= top[:, None]
        w = self._exp(x)
        wd = w * self._d
        total = np.add.reduce(w, -1)
        mean = np.vecdot(w, self._d) / total
        square = mean * mean
        variance = np.vecdot(w, self._d2) / total - square
        self._x, self._w, self._total, self._log_sum = x, w, total, np.log(total)
        return Moments(
            alpha=alpha,
            F=self._log_sum + top - self.log_z[0] - alpha * self.gap,
            slope=mean - self.gap,
            curvature=variance,
            third=np.vecdot(wd, self._d2) / total - mean * (3 * variance + square),
        )

    def partitions(self, beta: Rows, other: Rows) -> tuple[Rows, Rows]:
        """See `Pair`."""
        betas = np.array([beta, other])
        known = ((betas == 0) | (betas == 1)) & ~(self.student_misses | self.teacher_misses)
        if known.all():
            return 0 * beta, 0 * other
        x = betas[:, :, None] * self._d
        x += self._student
        top = np.maximum.reduce(x, -1)
        x -= top[:, :, None]
        np.maximum(x, _LEAST, out=x)
        total = np.add.reduce(np.exp(x, out=x), -1)
        F = np.where(known, 0.0, np.log(total) + top - self.log_z[0] - betas * self.gap)
        return F[0], F[1]

    def ess(self, at: Moments) -> Rows:
        """See `Pair`. With p_student and p_teacher in memory a division will do."""
        w, squares = self._w, np.empty((2, self.rows))
        for p, square in zip(self._weights, squares, strict=True):
            np.vecdot(w, w / p, out=square)
        squares *= self._z
        return 1 / np.maximum(squares / (self._total * self._total), 1.0)

    def entropy(self) -> Rows:
        """See `Pair`."""
        return self._log_sum - np.vecdot(self._w, self._x) / self._total

    def draw(self, noise: Float32[Tensor, "rows vocab"]) -> tuple[Int64[Tensor, " rows"], Rows]:
        """See `Pair`."""
        y = noise.numpy().astype(np.float64)
        y += self._x
        token = y.argmax(-1)
        return torch.from_numpy(token), self._x[np.arange(self.rows), token] - self._log_sum

    def log_q(self) -> Float32[Tensor, "rows vocab"]:
        """See `Pair`."""
        log_q = torch.from_numpy(self._x - self._log_sum[:, None])
        return log_q.masked_fill_(log_q < FLOOR / 2, -torch.inf).to(torch.float32)

    def token_log_p(self, token: Int64[Tensor, " rows"]) -> tuple[Rows, Rows]:
        """See `Pair`."""
        ids, every = token.numpy(), np.arange(self.rows)
        student, teacher = (
            x[every, ids].astype(np.float64) / self._temperature for x in self._logits
        )
        return student - self.offset[0], teacher - self.offset[1]


def _array(logits: Tensor) -> Float[np.ndarray, "rows vocab"]:
    """The same memory where NumPy knows its type."""
    array: Float[np.ndarray, "rows vocab"] = (
        logits.float() if logits.dtype == torch.bfloat16 else logits
    ).numpy()
    return array
