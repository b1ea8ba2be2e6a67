"""The distribution of the next token: `solve` or `solve_single`, then `draw`, `log_q`, `trace_of`.

Every engine takes q* from here. What `solve` gives is a value: it can be kept, and tokens that were
drawn elsewhere can be traced later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import (
    Array,
    argmax,
    array_of,
    at_least,
    at_most,
    stack,
    tensor_of,
    uses_numpy,
)
from optimal_sampling.distribution.cpu.tiled import TiledPair
from optimal_sampling.distribution.cpu.whole import MAX_VOCAB, WholePair
from optimal_sampling.distribution.methods import METHODS
from optimal_sampling.distribution.noise import NoiseSource, noise_tensor
from optimal_sampling.distribution.pair import Moments, Pair
from optimal_sampling.distribution.single import SingleModel
from optimal_sampling.distribution.support import keep_largest
from optimal_sampling.types import TRACE_TABLE

__all__ = [
    "Solved",
    "draw",
    "log_q",
    "make_pair",
    "row_slices",
    "solve",
    "solve_single",
    "trace_of",
]

_WHOLE_CHUNK = 1 << 15  # logits per model that are worked on together: near the cache
_TILED_CHUNK = 1 << 23


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """q of every row: proportional to p_student^(1-alpha) * p_teacher^alpha, or one model alone."""

    models: Pair | SingleModel
    mixture: MixtureConfig
    moments: Moments
    clamped: Array
    """Whether alpha_min or alpha_max moved alpha."""
    fallback: Array
    """Whether q is the teacher because the supports do not meet."""
    ess: tuple[Array, Array] | None
    """1 / sum q^2/p_student and 1 / sum q^2/p_teacher; None: not taken."""

    @property
    def alpha(self) -> Array:
        """Weight of the teacher."""
        return self.moments.alpha

    @property
    def truncated(self) -> bool:
        """Whether top-k or top-p cuts q."""
        return self.mixture.top_k > 0 or self.mixture.top_p < 1


def row_slices(rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Rows that are worked on together; at least one slice."""
    height = max(1, rows)
    if uses_numpy(device):
        height = max(1, (_WHOLE_CHUNK if vocab <= MAX_VOCAB else _TILED_CHUNK) // max(1, vocab))
    return (slice(first, first + height) for first in range(0, max(1, rows), height))


def make_pair(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    mixture: MixtureConfig,
) -> Pair:
    """The class of pair that suits the vocabulary and the device, whatever the number of rows."""
    whole = uses_numpy(student_logits.device) and student_logits.shape[1] <= MAX_VOCAB
    return (WholePair if whole else TiledPair)(student_logits, teacher_logits, mixture)


def solve(
    pair: Pair, position: Int[Tensor, " rows"], mixture: MixtureConfig, *, ess: bool = True
) -> Solved:
    """q of every row of a pair, made with the same `mixture`; once per pair.

    `position` is the index of the token in its completion, 0 for the first. Both ESS, a further
    pass over the vocabulary, are NaN in the trace without `ess`.
    """
    alpha, clamped = _choose_alpha(pair, position, mixture)
    pair.restore_support(alpha)
    moments = pair.moments(alpha)
    return Solved(
        models=pair,
        mixture=mixture,
        moments=moments,
        clamped=clamped,
        fallback=pair.disjoint & (alpha > 0),
        ess=_ess(pair, moments) if ess else None,
    )


def solve_single(
    logits: Float[Tensor, "rows vocab"],
    mixture: MixtureConfig,
    role: str,
) -> Solved:
    """The `student` or the `teacher` alone. What takes two models is NaN in the trace."""
    model = SingleModel(logits, mixture.temperature, role)
    unknown = model.moments.F
    return Solved(model, mixture, model.moments, clamped=unknown, fallback=unknown, ess=None)


def _choose_alpha(
    pair: Pair, position: Int[Tensor, " rows"], mixture: MixtureConfig
) -> tuple[Array, Array]:
    """alpha of every row within the bounds, and whether a bound moved it.

    Where the supports do not meet there is no mixture: q is the teacher, unless the configuration
    says alpha = 0 and the student has a token left.
    """
    xp = pair.xp
    free = METHODS[mixture.alpha_method](pair, position, mixture)
    if mixture.alpha_method not in ("fixed", "schedule") and pair.maybe_masked:
        free = xp.where(pair.disjoint, 1.0, free)
    alpha = at_most(at_least(free, mixture.alpha_min), mixture.alpha_max)
    clamped = xp.abs(alpha - free) > 1e-7  # one float32 step
    forced = pair.disjoint & ((alpha > 0) | pair.no_student)
    if mixture.force_first_token:
        forced = forced | (array_of(position) == 0)
    if not pair.none(forced):
        alpha = xp.where(forced, 1.0, alpha)
        clamped = clamped & ~forced
    return xp.asarray(xp.asarray(alpha, dtype=xp.float32), dtype=xp.float64), clamped


def _ess(pair: Pair, moments: Moments) -> tuple[Array, Array]:
    """Both ESS; 0 where q lives outside of a model's support."""
    student, teacher = pair.ess(moments)
    if pair.maybe_masked:
        student = pair.xp.where(pair.use_teacher, 0.0, student)
        teacher = pair.xp.where(pair.use_student, 0.0, teacher)
    return student, teacher


def log_q(solved: Solved) -> Float32[Tensor, "rows vocab"]:
    """What tokens are drawn from, normalised, after top-k and top-p. NaN in bad rows."""
    scores = solved.moments.log_q()
    if solved.truncated:
        keep = keep_largest(scores, solved.mixture.top_k, solved.mixture.top_p)
        scores = solved.moments.renormalise(scores.masked_fill_(~keep, -torch.inf))
    if solved.models.maybe_bad:
        scores.masked_fill_(tensor_of(solved.models.bad)[:, None], torch.nan)
    return scores


def draw(
    solved: Solved, noise: NoiseSource, from_log_q: Float32[Tensor, "rows vocab"] | None = None
) -> tuple[Int64[Tensor, " rows"], Array]:
    """argmax(log q + noise) of every row, the first of equals, and its log q; token 0 in bad rows.

    `from_log_q`: `log_q(solved)`, where it is made already.
    """
    models = solved.models
    made = noise_tensor(noise, models.vocab)
    if from_log_q is None and solved.truncated:
        from_log_q = log_q(solved)
    if from_log_q is None:
        token, chosen = solved.moments.draw(made)
    else:
        token = argmax(from_log_q + made)
        chosen = array_of(from_log_q.gather(-1, token[:, None])[:, 0].to(torch.float64))
    if models.maybe_bad:
        token.masked_fill_(tensor_of(models.bad), 0)
    return token, chosen


def trace_of(
    solved: Solved, token: Int64[Tensor, " rows"], drawn_log_q: Array | None = None
) -> Float32[Tensor, "rows fields"]:
    """The fields of `types.TRACE_TABLE` for one token per row; NaN in bad rows.

    `drawn_log_q`: log q of the token as `draw` gives it; else that before top-k and top-p.
    """
    models = solved.models
    values = _quantities(solved)
    student, teacher = models.token_log_p(token)
    if drawn_log_q is None:
        drawn_log_q = _mixed_log_p(solved, student, teacher)
    values |= {"log_p_student": student, "log_p_teacher": teacher, "log_q": drawn_log_q}
    trace = stack([field.value(values) for field in TRACE_TABLE])
    if models.maybe_bad:
        trace = models.xp.where(models.bad, float("nan"), trace)
    return tensor_of(models.xp.asarray(trace, dtype=models.xp.float32)).T.contiguous()


def _quantities(solved: Solved) -> dict[str, Array]:
    """What does not depend on the token, by name. KLs, ESS and entropy are of the untruncated q."""
    models = solved.models
    moments = solved.moments
    where = models.xp.where
    kl_student = at_least(moments.kl_student, 0.0)
    kl_teacher = at_least(moments.kl_teacher, 0.0)
    ess = solved.ess
    curvature = at_least(moments.curvature, 0.0)
    if models.maybe_masked:
        kl_student = where(models.use_teacher, float("inf"), kl_student)
        kl_teacher = where(models.use_student, float("inf"), kl_teacher)
        one_support = models.use_teacher | models.use_student
        curvature = where(one_support, float("inf"), curvature)
    return {
        "alpha": moments.alpha,
        "clamped": solved.clamped,
        "kl_student": kl_student,
        "kl_teacher": kl_teacher,
        "ess_student": models.full(float("nan")) if ess is None else ess[0],
        "ess_teacher": models.full(float("nan")) if ess is None else ess[1],
        "entropy": at_least(moments.entropy, 0.0),
        "curvature": curvature,
        "fallback": solved.fallback,
    }


def _mixed_log_p(solved: Solved, student: Array, teacher: Array) -> Array:
    """log q of tokens from their log p, before top-k and top-p. 0 times -inf is no part of it."""
    where = solved.models.xp.where
    alpha = solved.alpha
    mixed = (1 - alpha) * student + alpha * teacher - solved.moments.F
    return where(alpha == 1, teacher, where(alpha == 0, student, mixed))
