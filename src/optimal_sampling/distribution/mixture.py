"""One token per row, drawn from q: `step` is `make_pair`, `solve`, `draw` and `trace_of` in turn.

Every engine takes q* from this file. What `solve` gives is a value: it can be kept, and tokens that
were drawn elsewhere can be traced later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import (
    Array,
    Flags,
    Logits,
    Positions,
    Scores,
    Tokens,
    argmax,
    array_of,
    at_least,
    at_most,
    check_shapes,
    cuts,
    fill_rows,
    keep_largest,
    stack,
    tensor_of,
    to_float32,
    uses_numpy,
    values_of,
)
from optimal_sampling.distribution.cpu.tiled import TiledPair
from optimal_sampling.distribution.cpu.whole import MAX_VOCAB, WholePair
from optimal_sampling.distribution.gpu.launch import fused_draft, fused_step, runs_fused
from optimal_sampling.distribution.methods import METHODS
from optimal_sampling.distribution.noise import NoiseSource, noise_of, noise_tensor
from optimal_sampling.distribution.pair import Moments, Pair, SingleModel
from optimal_sampling.distribution.rules import solve_rule
from optimal_sampling.types import TRACE_TABLE

__all__ = [
    "Drawn",
    "Solved",
    "draft",
    "draw",
    "log_q",
    "make_pair",
    "row_slices",
    "single_step",
    "solve",
    "solve_single",
    "step",
    "trace_of",
]

MOST_LISTED = 256
"""Likeliest tokens that a draft within a nucleus is made from."""

_WHOLE_CHUNK = 1 << 15  # logits per model that are worked on together: near the cache
_TILED_CHUNK = 1 << 23
_NAN = float("nan")
_INF = float("inf")
_quiet = np.errstate(all="ignore")


@dataclass(frozen=True)
class Drawn:
    """One drawn token per row. A row that is bad has token 0 and a trace of NaN."""

    token: Tokens
    trace: Float32[Tensor, "rows fields"]
    """Of `types.TRACE_FIELDS`. KLs, ESS and entropy describe q before top-k and top-p."""
    bad_student: Bool[Tensor, " rows"]
    """The student's logits hold NaN or +inf, or nothing but -inf."""
    bad_teacher: Bool[Tensor, " rows"]
    log_q: Scores | None = None
    """What the token was drawn from, after top-k and top-p; on request. NaN in bad rows."""

    def pack(self) -> Float32[Tensor, "rows columns"]:
        """Token, bad_student, bad_teacher and the trace: one copy to the host. Ids to 2^24."""
        integers = [self.token, self.bad_student, self.bad_teacher]
        head = torch.stack(integers, -1).to(torch.float32)
        return torch.cat([head, self.trace], -1)

    @staticmethod
    def concatenate(parts: Sequence[Drawn]) -> Drawn:
        """Tokens of more rows."""
        names = ["token", "trace", "bad_student", "bad_teacher"]
        if parts[0].log_q is not None:
            names.append("log_q")
        columns = [[getattr(part, name) for part in parts] for name in names]
        return Drawn(*[torch.cat(column) for column in columns])


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """q of every row: a mixture of two models, or one of them alone.

    `trace_of` reads the logits that `make_pair` was given: they must stay as they are until its
    last call.
    """

    models: Pair | SingleModel
    mixture: MixtureConfig
    moments: Moments
    clamped: Array | Flags
    """Whether alpha_min or alpha_max moved alpha."""
    fallback: Array | Flags
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
        return cuts(self.mixture.top_k, self.mixture.top_p)


# In one call


@torch.no_grad()
@_quiet
def step(
    student_logits: Logits,
    teacher_logits: Logits,
    noise: NoiseSource,
    position: Positions,
    mixture: MixtureConfig,
    *,
    keep_log_q: bool = False,
) -> Drawn:
    """Draw one token per row from q, the mixture of both models that `mixture` describes.

    `position` is the index of the token in its completion, 0 for the first. A row's result has the
    same bits whatever rows are beside it. On a GPU the programs of `gpu` do what they cover, where
    Triton is installed. ValueError where the two logits have different shapes.
    """
    check_shapes(student_logits, teacher_logits)
    rows, vocab = student_logits.shape
    device = student_logits.device
    if runs_fused(device, mixture, keep_log_q):
        return Drawn(*fused_step(student_logits, teacher_logits, noise, position, mixture))
    parts = []
    for part in row_slices(rows, vocab, device):
        pair = _make_pair(student_logits[part], teacher_logits[part], mixture)
        solved = _solve(pair, position[part], mixture)
        parts.append(_draw_and_trace(solved, noise[part], keep_log_q))
    if len(parts) == 1:
        return parts[0]
    return Drawn.concatenate(parts)


@torch.no_grad()
@_quiet
def single_step(
    logits: Logits,
    noise: NoiseSource,
    mixture: MixtureConfig,
    role: str,
) -> Drawn:
    """Draw from the `student` or the `teacher` alone."""
    return _draw_and_trace(solve_single(logits, mixture, role), noise)


def _draw_and_trace(solved: Solved, noise: NoiseSource, keep_log_q: bool = False) -> Drawn:
    kept = _log_q(solved) if keep_log_q else None
    token, drawn_log_q = _draw(solved, noise, kept)
    return Drawn(
        token,
        _trace_of(solved, token, drawn_log_q),
        tensor_of(solved.models.bad_student),
        tensor_of(solved.models.bad_teacher),
        kept,
    )


@torch.no_grad()
def draft(student_logits: Logits, noise: NoiseSource, mixture: MixtureConfig) -> Tokens:
    """argmax(log p_student + noise): what the student alone would draw with this noise.

    Of the student's tokens within the top-k and top-p of the mixture: its likeliest for top_k=1. A
    nucleus is looked for among its MOST_LISTED likeliest tokens.
    """
    top_k, top_p = mixture.top_k, mixture.top_p
    truncates = cuts(top_k, top_p)
    if runs_fused(student_logits.device) and (top_k == 1 or not truncates):
        return fused_draft(student_logits, noise, mixture.temperature, greedy=top_k == 1)
    if top_k == 1:
        return argmax(student_logits.to(torch.float32))
    if truncates:
        return _draft_of_list(student_logits, noise, mixture)
    made = noise_tensor(noise, student_logits.shape[1])
    noisy = torch.add(made, student_logits, alpha=1 / mixture.temperature)
    return argmax(noisy)


def _draft_of_list(student_logits: Logits, noise: NoiseSource, mixture: MixtureConfig) -> Tokens:
    """A draft from the student's likeliest tokens, without a sort of the row."""
    scaled = student_logits.to(torch.float32) / mixture.temperature
    is_limited = mixture.top_k > 0
    count = min(mixture.top_k if is_limited else MOST_LISTED, scaled.shape[1])
    scores, ids = scaled.topk(count)
    if mixture.top_p < 1:
        whole = scores if is_limited else scaled
        share = (scores - whole.logsumexp(-1, keepdim=True)).exp()
        before = share.cumsum(-1) - share
        outside = before >= mixture.top_p
        outside[:, 0] = False
        scores.masked_fill_(outside, -torch.inf)
    place = argmax(scores + noise_of(noise, ids))
    return ids.gather(-1, place[:, None])[:, 0]


def row_slices(rows: int, vocab: int, device: torch.device) -> Iterator[slice]:
    """Rows that are worked on together; at least one slice."""
    rows = max(1, rows)
    height = rows
    if uses_numpy(device):
        chunk = _WHOLE_CHUNK if vocab <= MAX_VOCAB else _TILED_CHUNK
        height = max(1, chunk // max(1, vocab))
    return (slice(first, first + height) for first in range(0, rows, height))


# In parts


def _make_pair(
    student_logits: Logits,
    teacher_logits: Logits,
    mixture: MixtureConfig,
    support: Bool[Tensor, "rows vocab"] | None = None,
) -> Pair:
    """The class of pair that suits the vocabulary and the device, whatever the number of rows.

    A pair refers to the logits: they must not be changed until the last `trace_of`. `support`:
    tokens that both models are restricted to, in place of what `mixture` says of these logits.
    ValueError where the two have different shapes.
    """
    small = student_logits.shape[1] <= MAX_VOCAB
    if small and uses_numpy(student_logits.device):
        return WholePair(student_logits, teacher_logits, mixture, support)
    return TiledPair(student_logits, teacher_logits, mixture, support)


def _solve(pair: Pair, position: Positions, mixture: MixtureConfig, *, ess: bool = True) -> Solved:
    """q of every row of a pair, made with the same `mixture`; once per pair.

    `position` is the index of the token in its completion, 0 for the first. Both ESS, a further
    pass over the vocabulary, are NaN in the trace without `ess`. ValueError where the pair is of
    another temperature or teacher support, RuntimeError the second time.
    """
    if mixture is not pair.mixture:
        _check_mixture(pair.mixture, mixture)
    if not mixture.is_geometric:
        return _solve_rule(pair, position, mixture)
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


def _solve_rule(pair: Pair, position: Positions, mixture: MixtureConfig) -> Solved:
    """`_solve` for a mixture that has no alpha: the teacher where the student has no support."""
    forced = pair.no_student & ~pair.bad
    if mixture.force_first_token:
        forced = forced | (array_of(position) == 0)
    pair.restore_support(pair.full(_NAN))
    moments = solve_rule(pair, mixture, forced)
    clamped = pair.bad & False
    return Solved(pair, mixture, moments, clamped, pair.no_student, moments.both_ess)


def _check_mixture(made: MixtureConfig, mixture: MixtureConfig) -> None:
    """ValueError where a pair made with one mixture is not that of the other."""
    support = "teacher_support_top_k", "teacher_support_top_p", "support_min_p"
    for name in ("temperature", "is_geometric", *support):
        has = getattr(made, name)
        wanted = getattr(mixture, name)
        if has != wanted:
            raise ValueError(
                f"the pair was made with {name}={has} and is solved with {wanted}: "
                "give `make_pair` and `solve` the same mixture"
            )


def solve_single(logits: Logits, mixture: MixtureConfig, role: str) -> Solved:
    """The `student` or the `teacher` alone. What takes two models is NaN in the trace.

    ValueError for another role.
    """
    model = SingleModel(logits, mixture.temperature, role)
    unknown = model.moments.F
    return Solved(model, mixture, model.moments, clamped=unknown, fallback=unknown, ess=None)


def _choose_alpha(pair: Pair, position: Positions, mixture: MixtureConfig) -> tuple[Array, Flags]:
    """alpha of every row within the bounds, and whether a bound moved it.

    Where the supports do not meet there is no mixture: q is the teacher, unless the configuration
    says alpha = 0 and the student has a token left.
    """
    xp = pair.xp
    free = METHODS[mixture.alpha_method](pair, position, mixture)
    if mixture.alpha_method not in ("fixed", "schedule") and pair.maybe_masked:
        free = xp.where(pair.disjoint, 1.0, free)
    if mixture.has_bounds:
        alpha = at_most(at_least(free, mixture.alpha_min), mixture.alpha_max)
        clamped = xp.abs(alpha - free) > 1e-7  # one float32 step
    else:
        alpha, clamped = free, pair.bad & False
    forced = pair.disjoint & ((alpha > 0) | pair.no_student)
    if mixture.force_first_token:
        forced = forced | (array_of(position) == 0)
    if not pair.none(forced):
        alpha = xp.where(forced, 1.0, alpha)
        clamped = clamped & ~forced
    return to_float32(alpha, xp), clamped


def _ess(pair: Pair, moments: Moments) -> tuple[Array, Array]:
    """Both ESS; 0 where q lives outside of a model's support."""
    student, teacher = pair.ess(moments)
    if pair.maybe_masked:
        student = pair.xp.where(pair.use_teacher, 0.0, student)
        teacher = pair.xp.where(pair.use_student, 0.0, teacher)
    return student, teacher


def _log_q(solved: Solved) -> Scores:
    """What tokens are drawn from, normalised, after top-k and top-p. NaN in bad rows."""
    scores = solved.moments.log_q()
    if solved.truncated:
        keep = keep_largest(scores, solved.mixture.top_k, solved.mixture.top_p)
        kept = scores.masked_fill_(~keep, -torch.inf)
        scores = solved.moments.renormalise(kept)
    if solved.models.maybe_bad:
        fill_rows(scores, solved.models.bad, torch.nan)
    return scores


def _draw(
    solved: Solved, noise: NoiseSource, from_log_q: Scores | None = None
) -> tuple[Tokens, Array]:
    """argmax(log q + noise) of every row, the first of equals, and its log q; token 0 in bad rows.

    `from_log_q`: `log_q(solved)`, where it is made already.
    """
    models = solved.models
    made = noise_tensor(noise, models.vocab)
    if from_log_q is None and solved.truncated:
        from_log_q = _log_q(solved)
    if from_log_q is None:
        token, chosen = solved.moments.draw(made)
    else:
        token = argmax(from_log_q + made)
        chosen = values_of(from_log_q, token)
    if models.maybe_bad:
        token.masked_fill_(tensor_of(models.bad), 0)
    return token, chosen


def _trace_of(
    solved: Solved, token: Tokens, drawn_log_q: Array | None = None
) -> Float32[Tensor, "rows fields"]:
    """The fields of `types.TRACE_TABLE` for one token per row; NaN in bad rows.

    `drawn_log_q`: log q of the token as `draw` gives it; else that before top-k and top-p.
    """
    models = solved.models
    xp = models.xp
    student, teacher = models.token_log_p(token)
    if drawn_log_q is None:
        drawn_log_q = solved.moments.token_log_q(token)
    if drawn_log_q is None:
        drawn_log_q = _mixed_log_p(solved, student, teacher)
    values = _quantities(solved)
    values |= {"log_p_student_restricted": student, "log_q": drawn_log_q}
    if models.log_mass is not None:
        mass_student, mass_teacher = models.log_mass
        student, teacher = student + mass_student, teacher + mass_teacher
    values |= {"log_p_student": student, "log_p_teacher": teacher}
    trace = stack([field.value(values) for field in TRACE_TABLE])
    if models.maybe_bad:
        trace = xp.where(models.bad, _NAN, trace)
    rounded = tensor_of(xp.asarray(trace, dtype=xp.float32))
    return rounded.T.contiguous()


def _quantities(solved: Solved) -> dict[str, Array | Flags]:
    """What does not depend on the token, by name. KLs, ESS and entropy are of the untruncated q."""
    moments = solved.moments
    kl_student, kl_teacher, curvature = _divergences(solved)
    values = {
        "alpha": moments.alpha,
        "clamped": solved.clamped,
        "entropy": at_least(moments.entropy, 0.0),
        "curvature": curvature,
        "fallback": solved.fallback,
        "kl_student_restricted": kl_student,
        "kl_teacher_restricted": kl_teacher,
    }
    ess_student, ess_teacher = solved.ess or (solved.models.full(_NAN),) * 2
    vetoed = solved.models.full(0.0) + moments.left_out
    log_mass = solved.models.log_mass
    if log_mass is not None:
        # all of q lies in the support S, where log p = log p restricted + log p(S)
        student, teacher = (solved.models.xp.exp(each) for each in log_mass)
        kl_student, kl_teacher = kl_student - log_mass[0], kl_teacher - log_mass[1]
        ess_student, ess_teacher = ess_student * student, ess_teacher * teacher
        vetoed = 1 - student + student * vetoed
    return values | {
        "kl_student": kl_student,
        "kl_teacher": kl_teacher,
        "ess_student": ess_student,
        "ess_teacher": ess_teacher,
        "vetoed": vetoed,
    }


def _divergences(solved: Solved) -> tuple[Array, Array, Array]:
    """KL to student and teacher within the support, and the curvature."""
    models = solved.models
    moments = solved.moments
    kl_student = at_least(moments.kl_student, 0.0)
    kl_teacher = at_least(moments.kl_teacher, 0.0)
    curvature = at_least(moments.curvature, 0.0)
    if models.maybe_masked:
        where = models.xp.where
        one_support = models.use_teacher | models.use_student
        kl_student = where(models.use_teacher, _INF, kl_student)
        kl_teacher = where(models.use_student, _INF, kl_teacher)
        curvature = where(one_support, _INF, curvature)
    return kl_student, kl_teacher, curvature


def _mixed_log_p(solved: Solved, student: Array, teacher: Array) -> Array:
    """log q of tokens from their log p, before top-k and top-p. 0 times -inf is no part of it."""
    where = solved.models.xp.where
    alpha = solved.alpha
    mixed = (1 - alpha) * student + alpha * teacher
    mixed -= solved.moments.F
    below_one = where(alpha == 0, student, mixed)
    return where(alpha == 1, teacher, below_one)


# NumPy's warnings are off in each; `step` turns them off once, which takes a microsecond
make_pair = _quiet(_make_pair)
solve = _quiet(_solve)
log_q = _quiet(_log_q)
draw = _quiet(_draw)
trace_of = _quiet(_trace_of)
