"""Mixtures that are not geometric: one function per rule, from a pair of models to log q itself.

A rule has no alpha. All vocabulary-wide numbers are float64 over small vocabularies on a CPU, else
float32; sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import (
    Array,
    Flags,
    Scores,
    Tokens,
    argmax,
    array_of,
    at_least,
    keep_likely,
    keep_top_k,
    tensor_of,
    uses_numpy,
    values_of,
)
from optimal_sampling.distribution.pair import MASKED, MASKED_LOGIT, Moments, Pair

__all__ = ["RULES", "RuleMoments", "solve_rule"]

_INF = float("inf")

Wide: TypeAlias = Float[Tensor, "rows vocab"]
"""float32 or float64; MASKED_LOGIT or less stands for -inf."""


@dataclass(slots=True, eq=False)
class RuleMoments(Moments):
    """q as log-probabilities, [rows, vocab]. alpha is NaN, and 1 where q is the teacher."""

    scores: Wide
    to_student: Array
    to_teacher: Array
    nats: Array
    both_ess: tuple[Array, Array]
    replaced: Array | float

    @property
    def kl_student(self) -> Array:
        """KL(q||p_student)."""
        return self.to_student

    @property
    def kl_teacher(self) -> Array:
        """KL(q||p_teacher)."""
        return self.to_teacher

    @property
    def entropy(self) -> Array:
        """H(q)."""
        return self.nats

    @property
    def left_out(self) -> Array | float:
        """1 - p_student(S), with S the set of the rule."""
        return self.replaced

    def draw(self, noise: Scores) -> tuple[Tokens, Array]:
        """argmax(log q + noise) and its log q."""
        token = argmax(self.scores + noise)
        return token, values_of(self.scores, token)

    def log_q(self) -> Scores:
        """log q, -inf where it is 0; a new tensor."""
        return self.scores.masked_fill(self.scores < MASKED, -torch.inf).to(torch.float32)

    def token_log_q(self, token: Tokens) -> Array:
        """log q of tokens."""
        return values_of(self.scores, token)


Rule: TypeAlias = Callable[[Wide, Wide, MixtureConfig], tuple[Wide, Array | float]]
"""From log p_student and log p_teacher to log q and to the student's mass that is replaced."""

RULES: dict[str, Rule] = {}


def _register(rule: Rule) -> Rule:
    RULES[rule.__name__] = rule
    return rule


@_register
def arithmetic(student: Wide, teacher: Wide, mixture: MixtureConfig) -> tuple[Wide, float]:
    """q = a p_teacher + (1 - a) p_student (MiniLLM's teacher-mixed sampling, arXiv 2306.08543)."""
    weight = mixture.arithmetic_weight
    return _log_add(student + _log(1 - weight), teacher + _log(weight)), 0.0


@_register
def interleaved(student: Wide, teacher: Wide, mixture: MixtureConfig) -> tuple[Wide, Array]:
    """q = p_student on S + (1 - p_student(S)) p_teacher, with S the teacher's likeliest tokens.

    Speculative knowledge distillation (arXiv 2410.11325).
    """
    keep = _plausible(teacher, mixture)
    outside = _log_sum_exp(student.masked_fill(keep, MASKED_LOGIT))
    inside = student.masked_fill(~keep, MASKED_LOGIT)
    scores = _log_add(inside, teacher + outside.to(teacher.dtype)[:, None])
    return scores, array_of(outside.exp())


def _plausible(teacher: Wide, mixture: MixtureConfig) -> Bool[Tensor, "rows vocab"]:
    """S of `interleaved`; no token that the teacher does not have."""
    ranked = teacher.to(torch.float32)
    if mixture.interleaved_min_p is not None:
        return keep_likely(ranked, mixture.interleaved_min_p)
    return keep_top_k(ranked, mixture.interleaved_top_k) & (teacher > MASKED)


def _log(weight: float) -> float:
    return math.log(weight) if weight > 0 else MASKED_LOGIT


def _log_add(x: Wide, y: Wide) -> Wide:
    """log(exp(x) + exp(y)). On a CPU NumPy's: the last bit of torch's depends on the batch."""
    if uses_numpy(x.device):
        return torch.from_numpy(np.logaddexp(x.numpy(), y.numpy()))
    return torch.logaddexp(x, y)


def _log_sum_exp(scores: Wide) -> Float[Tensor, " rows"]:
    """log of the sum of exp(score), float64; MASKED_LOGIT or less for nothing."""
    top = scores.amax(-1, keepdim=True)
    return _row_sum((scores - top).exp_()).log() + top[:, 0]


def _row_sum(x: Wide) -> Float[Tensor, " rows"]:
    """Sum of every row, float64. NumPy's does not depend on the number of rows or of threads."""
    if uses_numpy(x.device):
        return torch.from_numpy(np.add.reduce(x.numpy(), -1, dtype=np.float64))
    return x.sum(-1, dtype=torch.float64)


def solve_rule(pair: Pair, mixture: MixtureConfig, forced: Flags) -> RuleMoments:
    """q of every row by the rule of the mixture; the teacher where `forced`."""
    student, teacher = (
        model - tensor_of(log_z).to(model.dtype)[:, None]
        for model, log_z in zip(pair.models, pair.log_z, strict=True)
    )
    scores, replaced = RULES[mixture.alpha_method](student, teacher, mixture)
    if not pair.none(forced):
        scores = torch.where(tensor_of(forced)[:, None], teacher, scores)
    alpha = pair.xp.where(forced, 1.0, pair.full(float("nan")))
    return _moments(pair, alpha, (student, teacher, scores), replaced)


def _moments(
    pair: Pair, alpha: Array, rows: tuple[Wide, Wide, Wide], replaced: Array | float
) -> RuleMoments:
    """All diagnostics, from the log-probabilities of student, teacher and q."""
    student, teacher, scores = rows
    q = scores.exp()
    to_student = _expected(q, scores - student)
    to_teacher = _expected(q, scores - teacher)
    d = teacher - student
    mean = _expected(q, d)
    curvature = _expected(q, (d - mean.to(d.dtype)[:, None]).square_())
    ess = [1 / at_least(array_of(_row_sum((2 * scores - x).exp_())), 1.0) for x in rows[:2]]
    numbers = [array_of(x) for x in (to_student, to_teacher, curvature)]
    if pair.maybe_masked:
        has_q = scores > MASKED
        lacks = [array_of((has_q & (x < MASKED)).any(-1)) for x in rows[:2]]
        lacks.append(lacks[0] | lacks[1])
        numbers = [pair.xp.where(k, _INF, x) for k, x in zip(lacks, numbers, strict=True)]
        ess = [pair.xp.where(k, 0.0, x) for k, x in zip(lacks, ess, strict=False)]
    unknown = pair.full(float("nan"))
    return RuleMoments(
        alpha=alpha,
        F=unknown,
        slope=numbers[0] - numbers[1],
        curvature=numbers[2],
        third=unknown,
        log_sum=unknown,
        scores=scores,
        to_student=numbers[0],
        to_teacher=numbers[1],
        nats=array_of(-_expected(q, scores)),
        both_ess=(ess[0], ess[1]),
        replaced=replaced,
    )


def _expected(q: Wide, x: Wide) -> Float[Tensor, " rows"]:
    """E_q[x], float64. What q does not have weighs 0, whatever finite number x is there."""
    return _row_sum(q * x)
