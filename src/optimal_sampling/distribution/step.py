"""One token for every row: alpha, the mixture, the draw and its diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.direct import WIDEST, DirectPair
from optimal_sampling.distribution.fused import fused_draft, fused_step, runs_fused
from optimal_sampling.distribution.methods import METHODS
from optimal_sampling.distribution.noise import NoiseKeys, noise_tensor
from optimal_sampling.distribution.pair import Moments, Pair
from optimal_sampling.distribution.support import keep_largest
from optimal_sampling.distribution.tiled import TiledPair
from optimal_sampling.distribution.tiles import (
    Rows,
    argmax,
    at_least,
    at_most,
    namespace,
    rows_of,
    stack,
    tensor_of,
)

__all__ = [
    "Noise",
    "Step",
    "choose_alpha",
    "confident_draft",
    "distances",
    "draft",
    "pair_of",
    "rows_at_once",
    "step",
]

Noise: TypeAlias = Float32[Tensor, "rows vocab"] | NoiseKeys
"""Gumbel noise, or what it is made from: on a GPU the fused kernel makes it token by token, never as a tensor."""

_DIRECT_CHUNK, _TILED_CHUNK = (
    1 << 15,
    1 << 23,
)  # logits per model that are worked on together: near the cache


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
        return Step(
            packed[:, 0].to(torch.int64), packed[:, 3:], packed[:, 1] != 0, packed[:, 2] != 0
        )


@torch.no_grad()
def draft(
    student_logits: Float[Tensor, "rows vocab"], noise: Noise, mixture: MixtureConfig
) -> Int64[Tensor, " rows"]:
    """The token that the student alone would draw with this noise: argmax(log p_student + noise)."""
    if runs_fused(student_logits.device):
        return fused_draft(student_logits, noise, mixture.temperature)[0]
    made = noise_tensor(noise, student_logits.shape[1])
    return argmax(torch.add(made, student_logits, alpha=1 / mixture.temperature))


@torch.no_grad()
def confident_draft(
    student_logits: Float[Tensor, "rows vocab"], noise: Noise, mixture: MixtureConfig
) -> tuple[Int64[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """`draft`, and log p_student of its tokens: how sure the student was."""
    if runs_fused(student_logits.device):
        return fused_draft(student_logits, noise, mixture.temperature)
    token = draft(student_logits, noise, mixture)
    scaled = student_logits.to(torch.float32) / mixture.temperature
    return token, scaled.gather(-1, token[:, None])[:, 0] - scaled.logsumexp(-1)


@torch.no_grad()
@np.errstate(all="ignore")
def step(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    noise: Noise,
    position: Int[Tensor, " rows"],
    mixture: MixtureConfig,
    *,
    keep_log_q: bool = False,
) -> Step:
    """Draw one token per row from q, proportional to p_student^(1-alpha) * p_teacher^alpha.

    `position` is the index of the token in its completion, 0 for the first. A row's result has the same bits whatever
    rows are beside it. On a GPU the kernel of `fused.py` does what it covers, where Triton is installed.
    """
    if runs_fused(student_logits.device, mixture, keep_log_q):
        return Step(*fused_step(student_logits, teacher_logits, noise, position, mixture))
    height = rows_at_once(student_logits.shape[1], student_logits.device)
    slices = [slice(first, first + height) for first in range(0, max(1, len(position)), height)]
    parts = [
        _step(student_logits[i], teacher_logits[i], noise[i], position[i], mixture, keep_log_q)
        for i in slices
    ]
    return parts[0] if len(parts) == 1 else Step.concatenate(parts)


def rows_at_once(vocab: int, device: torch.device) -> int:
    """How many rows are worked on together."""
    if namespace(device) is torch:
        return 1 << 30
    return max(1, (_DIRECT_CHUNK if vocab <= WIDEST else _TILED_CHUNK) // max(1, vocab))


def pair_of(student_logits: Float[Tensor, "rows vocab"], *arguments: Any) -> Pair:
    """The class of pair that suits the vocabulary and the device, whatever the number of rows."""
    direct = namespace(student_logits.device) is np and student_logits.shape[1] <= WIDEST
    return (DirectPair if direct else TiledPair)(student_logits, *arguments)


def _step(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    noise: Noise,
    position: Int[Tensor, " rows"],
    mixture: MixtureConfig,
    keep_log_q: bool,
) -> Step:
    """`step` for as many rows as are worked on together."""
    support = mixture.teacher_support_top_k, mixture.teacher_support_top_p
    pair = pair_of(student_logits, teacher_logits, mixture.temperature, *support)
    alpha, clamped = choose_alpha(pair, position, mixture)
    pair.restore(alpha)
    at = pair.moments(alpha)
    token, log_q_token, log_q = _draw(pair, noise_tensor(noise, pair.vocab), mixture, keep_log_q)
    if not pair.none(pair.bad):
        token.masked_fill_(tensor_of(pair.bad), 0)
    token_log_p = [*pair.token_log_p(token), log_q_token]
    columns = [alpha, clamped, *distances(pair, at), *token_log_p, pair.disjoint & (alpha > 0)]
    return Step(
        token,
        _trace(pair, columns),
        tensor_of(pair.bad_student),
        tensor_of(pair.bad_teacher),
        log_q,
    )


def _trace(pair: Pair, columns: list[Rows]) -> Float32[Tensor, "rows fields"]:
    """The columns in the order of `TRACE_FIELDS`; NaN in bad rows."""
    trace = stack(columns)
    if not pair.none(pair.bad):
        trace = pair.xp.where(pair.bad, float("nan"), trace)
    return tensor_of(pair.xp.asarray(trace, dtype=pair.xp.float32)).T.contiguous()


def choose_alpha(
    pair: Pair, position: Int[Tensor, " rows"], mixture: MixtureConfig
) -> tuple[Rows, Rows]:
    """alpha of every row, as the mixture takes it, and whether a bound moved it.

    Where the supports do not meet there is no mixture: q is the teacher, unless the configuration says alpha = 0
    and the student has a token left.
    """
    xp = pair.xp
    free = METHODS[mixture.alpha_method](pair, position, mixture)
    if mixture.alpha_method not in ("fixed", "schedule") and not pair.none(pair.floored):
        free = xp.where(pair.disjoint, 1.0, free)
    alpha = at_most(at_least(free, mixture.alpha_min), mixture.alpha_max)
    clamped = xp.abs(alpha - free) > 1e-7  # one float32 step
    forced = pair.disjoint & ((alpha > 0) | pair.no_student)
    if mixture.force_first_token:
        forced = forced | (rows_of(position) == 0)
    if not pair.none(forced):
        alpha, clamped = xp.where(forced, 1.0, alpha), clamped & ~forced
    return xp.asarray(xp.asarray(alpha, dtype=xp.float32), dtype=xp.float64), clamped


def distances(pair: Pair, at: Moments) -> list[Rows]:
    """KL of q to student and teacher, ESS to both, and its entropy."""
    xp = pair.xp
    kl_student, kl_teacher, entropy = at_least(
        stack([at.kl_student, at.kl_teacher, pair.entropy()]), 0.0
    )
    ess_student, ess_teacher = pair.ess(at)
    if not pair.none(pair.floored):
        kl_student = xp.where(pair.use_teacher, float("inf"), kl_student)
        kl_teacher = xp.where(pair.use_student, float("inf"), kl_teacher)
        ess_student = xp.where(pair.use_teacher, 0.0, ess_student)
        ess_teacher = xp.where(pair.use_student, 0.0, ess_teacher)
    return [kl_student, kl_teacher, ess_student, ess_teacher, entropy]


def _draw(
    pair: Pair, noise: Float32[Tensor, "rows vocab"], mixture: MixtureConfig, keep_log_q: bool
) -> tuple[Int64[Tensor, " rows"], Rows, Tensor | None]:
    """argmax(log q + noise), its log_q, and log_q itself where it is wanted."""
    truncated = mixture.top_k > 0 or mixture.top_p < 1
    if not (truncated or keep_log_q):
        return *pair.draw(noise), None
    log_q = pair.log_q()
    if truncated:
        log_q.masked_fill_(~keep_largest(log_q, mixture.top_k, mixture.top_p), -torch.inf)
        log_q -= log_q.to(torch.float64).logsumexp(-1, keepdim=True)
    token = argmax(log_q + noise)
    chosen = rows_of(log_q.gather(-1, token[:, None])[:, 0].to(torch.float64))
    return (
        token,
        chosen,
        log_q.masked_fill_(tensor_of(pair.bad)[:, None], torch.nan) if keep_log_q else None,
    )
