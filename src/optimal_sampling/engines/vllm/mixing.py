"""Two models' logits of one step -> what vLLM samples from. The mathematics is `distribution`'s.

vLLM divides logits by the request's temperature itself. So a row that is solved at temperature T is returned as
T log q*: what vLLM makes of it is log q* at T, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.pair import Moments, Pair
from optimal_sampling.distribution.step import choose_alpha, distances, pair_of, rows_at_once
from optimal_sampling.distribution.tiles import Rows, at_least, stack, tensor_of
from optimal_sampling.engines.vllm.request_options import RequestOptions
from optimal_sampling.types import TRACE_FIELDS

__all__ = ["Mixed", "Row", "mix"]

_KNOWN = TRACE_FIELDS[:7]  # alpha ... entropy: known before a token is drawn
_ENDS = "log_z_student", "log_z_teacher", "F", "fallback", "bad_student", "bad_teacher"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: which request, and the index of the token to be drawn in its completion (0 the first)."""

    request_id: str
    position: int
    options: RequestOptions


@dataclass
class Mixed:
    """What is known of a step's rows besides log q*, until its tokens are drawn."""

    student_logits: Float[Tensor, "rows vocab"] | None
    teacher_logits: Float[Tensor, "rows vocab"]
    values: Float64[Tensor, "rows columns"]
    """Columns `_KNOWN` and `_ENDS`; NaN where a row's trace level leaves one out."""
    temperature: list[float] = field(default_factory=list)

    def trace(self, rows: Sequence[int], tokens: Sequence[int]) -> list[list[float]]:
        """The values of TRACE_FIELDS for tokens drawn from these rows. log_q is before top-k and top-p."""
        device = self.teacher_logits.device
        index = torch.tensor(rows, device=device)
        ids = torch.tensor(tokens, device=device)
        known = self.values[index]
        log_z = known[:, len(_KNOWN) : len(_KNOWN) + 2]
        temperature = torch.tensor(
            [self.temperature[row] for row in rows], dtype=torch.float64, device=device
        )
        log_p_teacher = self.teacher_logits[index, ids].double() / temperature - log_z[:, 1]
        log_p_student = torch.full_like(log_p_teacher, torch.nan)
        if self.student_logits is not None:
            log_p_student = self.student_logits[index, ids].double() / temperature - log_z[:, 0]
        alpha, F = known[:, 0], known[:, len(_KNOWN) + 2]
        mixed = (1 - alpha) * log_p_student + alpha * log_p_teacher - F
        log_q = torch.where(
            alpha == 1, log_p_teacher, torch.where(alpha == 0, log_p_student, mixed)
        )
        fallback = known[:, len(_KNOWN) + 3]
        columns = [log_p_student, log_p_teacher, log_q, fallback]
        rows_of_values: list[list[float]] = torch.cat(
            [known[:, : len(_KNOWN)], torch.stack(columns, -1)], -1
        ).tolist()
        return rows_of_values

    @property
    def bad(self) -> Bool[Tensor, "rows 2"]:
        """Whether nothing can be drawn from a row, because of the student's and because of the teacher's logits."""
        return self.values[:, -2:].bool()


def mix(
    student_logits: Float[Tensor, "rows wide_vocab"] | None,
    teacher_logits: Float[Tensor, "rows wide_vocab"],
    rows: Sequence[Row] | None,
    default: MixtureConfig,
    vocab_size: int,
    width: int,
) -> tuple[Float32[Tensor, "rows width"], Mixed]:
    """What vLLM samples from, [rows, width], -inf beyond the `vocab_size` shared ids; and what is known of the rows.

    `rows=None`: rows that belong to no request's next token (a trial run, log-probabilities of a prompt). A row from
    which nothing can be drawn becomes uniform over the shared ids and is flagged.
    `student_logits=None`: all rows are the teacher's alone.
    """
    count = teacher_logits.shape[0]
    # vLLM runs under inference mode, whose tensors nobody else may write to; distribution's buffers are shared.
    with torch.inference_mode(False), torch.no_grad():
        student = None if student_logits is None else student_logits[:, :vocab_size]
        teacher = teacher_logits[:, :vocab_size]
        options = (
            [RequestOptions(default)] * count if rows is None else [row.options for row in rows]
        )
        position = torch.tensor(
            [max(row.position, 0) for row in rows] if rows else [1] * count, device=teacher.device
        )
        parts = []
        groups = _groups(options)
        for (mixture, mode, full), index in groups.items():
            where = (
                slice(None) if len(index) == count else torch.tensor(index, device=teacher.device)
            )
            if mode == "teacher" or student is None:
                parts.append(_teacher_rows(teacher[where], mixture.temperature))
            else:
                parts.append(
                    _mixed_rows(student[where], teacher[where], position[where], mixture, full)
                )
        scores, values = _in_order(parts, list(groups.values()))
        if width > vocab_size:
            scores = torch.nn.functional.pad(scores, (0, width - vocab_size), value=-torch.inf)
        return scores, Mixed(
            student, teacher, values, [each.mixture.temperature for each in options]
        )


def _in_order(
    parts: Sequence[tuple[Tensor, Tensor]], places: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Scores and values of all rows; those of a single group are in order, and are not copied."""
    if len(parts) == 1:
        return parts[0]
    scores, values = (torch.cat(each) for each in zip(*parts, strict=True))
    order = torch.tensor([row for index in places for row in index], device=scores.device).argsort()
    return scores[order], values[order]


def _groups(options: Sequence[RequestOptions]) -> dict[tuple[MixtureConfig, str, bool], list[int]]:
    """Rows that can be worked on together."""
    groups: dict[tuple[MixtureConfig, str, bool], list[int]] = {}
    for row, each in enumerate(options):
        groups.setdefault((each.mixture, each.mode, each.trace == "full"), []).append(row)
    return groups


@np.errstate(all="ignore")
def _mixed_rows(
    student: Float[Tensor, "rows vocab"],
    teacher: Float[Tensor, "rows vocab"],
    position: Int[Tensor, " rows"],
    mixture: MixtureConfig,
    full: bool,
) -> tuple[Float32[Tensor, "rows vocab"], Float64[Tensor, "rows columns"]]:
    """T log q* and the columns of `Mixed.values`, for rows of one configuration."""
    height = rows_at_once(student.shape[1], student.device)
    if student.shape[0] > height:
        parts = [
            _mixed_rows(
                student[i : i + height],
                teacher[i : i + height],
                position[i : i + height],
                mixture,
                full,
            )
            for i in range(0, student.shape[0], height)
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    support = mixture.teacher_support_top_k, mixture.teacher_support_top_p
    pair = pair_of(student, teacher, mixture.temperature, *support)
    alpha, clamped = choose_alpha(pair, position, mixture)
    pair.restore(alpha)
    at = pair.moments(alpha)
    log_q = pair.log_q()
    columns = [
        alpha,
        clamped,
        *(distances(pair, at) if full else _divergences(pair, at)),
        *pair.offset,
        at.F,
        pair.disjoint & (alpha > 0),
        pair.bad_student,
        pair.bad_teacher,
    ]
    values = tensor_of(
        stack([pair.xp.asarray(column, dtype=pair.xp.float64) for column in columns])
    ).T.contiguous()
    if not pair.none(pair.bad):
        bad = tensor_of(pair.bad)[:, None]
        log_q.masked_fill_(bad, 0.0)
        values[:, : -len(_ENDS)].masked_fill_(bad, torch.nan)
    return log_q.mul_(mixture.temperature) if mixture.temperature != 1 else log_q, values


def _divergences(pair: Pair, at: Moments) -> list[Rows]:
    """`distances` without what costs another pass over the vocabulary: NaN for both ESS."""
    where, nothing = pair.xp.where, pair.full(float("nan"))
    kl_student, kl_teacher = at_least(at.kl_student, 0.0), at_least(at.kl_teacher, 0.0)
    if not pair.none(pair.floored):
        kl_student = where(pair.use_teacher, float("inf"), kl_student)
        kl_teacher = where(pair.use_student, float("inf"), kl_teacher)
    return [kl_student, kl_teacher, nothing, nothing, at_least(pair.entropy(), 0.0)]


def _teacher_rows(
    teacher: Float[Tensor, "rows vocab"], temperature: float
) -> tuple[Float32[Tensor, "rows vocab"], Float64[Tensor, "rows columns"]]:
    """The teacher alone: its own logits. Diagnostics that take two models are NaN."""
    scores = teacher.to(torch.float32)
    log_z = (scores / temperature).to(torch.float64).logsumexp(-1)
    bad = ~log_z.isfinite()
    values = log_z.new_full((len(scores), len(_KNOWN) + len(_ENDS)), torch.nan)
    values[:, 0] = 1.0
    zero = torch.zeros_like(log_z)
    values[:, len(_KNOWN) :] = torch.stack(
        [zero + torch.nan, log_z, zero, zero, zero, bad.double()], -1
    )
    return torch.where(bad[:, None], 0.0, scores), values
