"""One token for every row: alpha, the mixture, the draw and its diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.methods import METHODS
from optimal_sampling.distribution.pair import Moments, Pair
from optimal_sampling.distribution.support import keep_largest
from optimal_sampling.distribution.tiles import FLOOR, Rows, at_least, rows_of, stack, tensor_of
from optimal_sampling.types import TRACE_FIELDS

__all__ = ["Step", "draft", "step"]

_CHUNK = 1 << 23  # logits per model that are worked on together: bounds the memory that is kept


@dataclass(frozen=True)
class Step:
    """One drawn token per row. A row that is bad has token 0 and a trace of NaN."""

    token: Int64[Tensor, " rows"]
    trace: Float32[Tensor, "rows fields"]
    """In the order of `types.TRACE_FIELDS`. KLs, ESS and entropy describe q before top-k and top-p."""
    bad_student: Bool[Tensor, " rows"]
    """The student's logits hold NaN or +inf, or nothing but -inf."""
    bad_teacher: Bool[Tensor, " rows"]
    log_q: Float32[Tensor, "rows vocab"] | None = None
    """What the token was drawn from, normalised, after top-k and top-p; only on request. NaN in bad rows."""

    def pack(self) -> Float32[Tensor, "rows columns"]:
        """Token, bad_student, bad_teacher and the trace in one tensor: one copy to the host. Ids to 2^24 are exact."""
        head = torch.stack([self.token, self.bad_student, self.bad_teacher], -1)
        return torch.cat([head.to(torch.float32), self.trace], -1)

    @staticmethod
    def concatenate(parts: Sequence[Step]) -> Step:
        """Steps of more rows."""
        kept = [part.log_q for part in parts if part.log_q is not None]
        return Step(
            torch.cat([part.token for part in parts]),
            torch.cat([part.trace for part in parts]),
            torch.cat([part.bad_student for part in parts]),
            torch.cat([part.bad_teacher for part in parts]),
            torch.cat(kept) if kept else None,
        )

    @staticmethod
    def unpack(packed: Float32[Tensor, "rows columns"]) -> Step:
        """The inverse of `pack`, without log_q."""
        return Step(packed[:, 0].to(torch.int64), packed[:, 3:], packed[:, 1] != 0, packed[:, 2] != 0)


@torch.no_grad()
def draft(
    student_logits: Float[Tensor, "rows vocab"], noise: Float32[Tensor, "rows vocab"], mixture: MixtureConfig
) -> Int64[Tensor, " rows"]:
    """The token that the student alone would draw with this noise: argmax(log p_student + noise)."""
    return _argmax(torch.add(noise, student_logits, alpha=1 / mixture.temperature))


@torch.no_grad()
@np.errstate(all="ignore")
def step(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    noise: Float32[Tensor, "rows vocab"],
    position: Int[Tensor, " rows"],
    mixture: MixtureConfig,
    *,
    keep_log_q: bool = False,
) -> Step:
    """Draw one token per row from q, proportional to p_student^(1-alpha) * p_teacher^alpha.

    `noise` is Gumbel; `position` is the index of the token in its completion, 0 for the first. A row's result has
    the same bits whatever rows are beside it.
    """
    height = max(1, _CHUNK // max(1, student_logits.shape[1])) if student_logits.device.type == "cpu" else 1 << 30
    slices = [slice(first, first + height) for first in range(0, max(1, student_logits.shape[0]), height)]
    parts = [
        _step(student_logits[rows], teacher_logits[rows], noise[rows], position[rows], mixture, keep_log_q)
        for rows in slices
    ]
    return parts[0] if len(parts) == 1 else Step.concatenate(parts)


def _step(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    noise: Float32[Tensor, "rows vocab"],
    position: Int[Tensor, " rows"],
    mixture: MixtureConfig,
    keep_log_q: bool,
) -> Step:
    """`step` for as many rows as are worked on together."""
    support = mixture.teacher_support_top_k, mixture.teacher_support_top_p
    pair = Pair(student_logits, teacher_logits, mixture.temperature, *support)
    alpha, clamped = choose_alpha(pair, position, mixture)
    pair.restore(alpha)
    at = pair.moments(alpha)
    token, log_q_token, log_q = _draw(pair, at, noise, mixture, keep_log_q)
    token.masked_fill_(tensor_of(pair.bad), 0)
    columns = {
        "alpha": alpha,
        "clamped": clamped,
        **_distances(pair, at),
        "log_p_student": _token_log_p(student_logits, token, mixture.temperature, pair.offset[0]),
        "log_p_teacher": _token_log_p(teacher_logits, token, mixture.temperature, pair.offset[1]),
        "log_q": log_q_token,
        "fallback": pair.disjoint & (alpha > 0),
    }
    trace = stack([pair.xp.asarray(columns[name], dtype=pair.xp.float64) for name in TRACE_FIELDS])
    trace = tensor_of(pair.xp.where(pair.bad, float("nan"), trace)).to(torch.float32).T.contiguous()
    return Step(token, trace, tensor_of(pair.bad_student), tensor_of(pair.bad_teacher), log_q)


def choose_alpha(pair: Pair, position: Int[Tensor, " rows"], mixture: MixtureConfig) -> tuple[Rows, Rows]:
    """alpha of every row, as the mixture takes it, and whether a bound moved it.

    Where the supports do not meet there is no mixture: q is the teacher, unless the configuration says alpha = 0
    and the student has a token left.
    """
    xp = pair.xp
    free = METHODS[mixture.alpha_method](pair, position, mixture)
    if mixture.alpha_method not in ("fixed", "schedule"):
        free = xp.where(pair.disjoint, 1.0, free)
    alpha = xp.clip(free, mixture.alpha_min, mixture.alpha_max)
    clamped = xp.abs(alpha - free) > 1e-7  # one float32 step
    forced = pair.disjoint & ((alpha > 0) | pair.no_student)
    if mixture.force_first_token:
        forced = forced | (rows_of(position) == 0)
    alpha = xp.asarray(xp.where(forced, 1.0, alpha), dtype=xp.float32)
    return xp.asarray(alpha, dtype=xp.float64), clamped & ~forced


def _distances(pair: Pair, at: Moments) -> dict[str, Rows]:
    """KL and ESS of q to both models, and its entropy. sum q^2/p_student = exp(F(2 alpha) - 2 F(alpha))."""
    xp, infinite = pair.xp, float("inf")
    student, teacher = pair.partitions(2 * at.alpha, 2 * at.alpha - 1)
    return {
        "kl_student": xp.where(pair.use_teacher, infinite, at_least(at.kl_student, 0.0)),
        "kl_teacher": xp.where(pair.use_student, infinite, at_least(at.kl_teacher, 0.0)),
        "ess_student": xp.where(pair.use_teacher, 0.0, 1 / at_least(xp.exp(student - 2 * at.F), 1.0)),
        "ess_teacher": xp.where(pair.use_student, 0.0, 1 / at_least(xp.exp(teacher - 2 * at.F), 1.0)),
        "entropy": at_least(at.entropy, 0.0),
    }


def _token_log_p(
    logits: Float[Tensor, "rows vocab"], token: Int64[Tensor, " rows"], temperature: float, offset: Rows
) -> Rows:
    """log p of the drawn tokens under one model, as restricted to the teacher's support."""
    return rows_of(logits.gather(-1, token[:, None])[:, 0].to(torch.float64)) / temperature - offset


def _draw(
    pair: Pair, at: Moments, noise: Float32[Tensor, "rows vocab"], mixture: MixtureConfig, keep_log_q: bool
) -> tuple[Int64[Tensor, " rows"], Rows, Tensor | None]:
    """argmax(log q + noise), its log_q, and log_q itself where it is wanted."""
    pair._set_weight(at.alpha)
    truncated = mixture.top_k > 0 or mixture.top_p < 1
    if not (truncated or keep_log_q):
        token, score = _draw_from_tiles(pair, noise)
        return token, rows_of(score) - at.log_sum, None
    log_q = _log_q(pair, at)
    if truncated:
        log_q.masked_fill_(~keep_largest(log_q, mixture.top_k, mixture.top_p), -torch.inf)
        log_q -= log_q.to(torch.float64).logsumexp(-1, keepdim=True)
    token = _argmax(log_q + noise)
    chosen = rows_of(log_q.gather(-1, token[:, None])[:, 0].to(torch.float64))
    return token, chosen, log_q.masked_fill_(tensor_of(pair.bad)[:, None], torch.nan) if keep_log_q else None


def _log_q(pair: Pair, at: Moments) -> Float32[Tensor, "rows vocab"]:
    """The normalised mixture in memory, -inf where it is 0."""
    log_q = torch.empty(pair.rows, pair.vocab, device=pair.device)
    log_sum = tensor_of(at.log_sum)[:, None]
    for block in pair.space.blocks:
        log_q[block.rows, block.columns] = pair.scores(block) - log_sum[block.rows]
    return log_q.masked_fill_(log_q < FLOOR / 2, -torch.inf)


def _draw_from_tiles(
    pair: Pair, noise: Float32[Tensor, "rows vocab"]
) -> tuple[Int64[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """argmax(score + noise) and its score, tile by tile, without log q in memory; the first of equals."""
    winners = []
    for block in pair.space.blocks:
        x = pair.scores(block)
        y = torch.add(x, noise[block.rows, block.columns], out=block.scratch[1][:, block.inner])
        best = _argmax(y)[:, None]
        winners.append((best[:, 0] + block.columns.start, x.gather(-1, best), y.gather(-1, best)))
    if not winners:
        return torch.zeros(0, dtype=torch.int64, device=pair.device), torch.zeros(0, device=pair.device)
    token, score, value = (torch.cat([w.reshape(-1) for w in part]) for part in zip(*winners, strict=True))
    if pair.space.tiles == 1:
        return token, score
    shape = pair.rows, pair.space.tiles
    tile = value.view(shape).argmax(-1, keepdim=True)
    return token.view(shape).gather(-1, tile)[:, 0], score.view(shape).gather(-1, tile)[:, 0]


def _argmax(y: Float[Tensor, "n width"]) -> Int64[Tensor, " n"]:
    """First of the largest. NumPy's is twenty times as fast on a CPU."""
    if y.device.type == "cpu":
        return torch.from_numpy(y.numpy().argmax(-1))
    return y.argmax(-1)
