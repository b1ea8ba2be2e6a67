"""Two models' logits of one step -> what vLLM samples from, by the mathematics of `distribution`.

vLLM divides logits by the request's temperature itself. So a row that is solved at temperature T is
returned as T log q*: what vLLM makes of it is log q* at T, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import (
    Solved,
    log_q,
    make_pair,
    row_slices,
    solve,
    solve_single,
    trace_of,
)
from optimal_sampling.distribution.arrays import (
    Logits,
    Positions,
    Scores,
    fill_rows,
    tensor_of,
)
from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.vllm.request_options import RequestOptions

__all__ = ["LogitsRow", "Mixed", "mix"]


@dataclass(frozen=True, slots=True)
class LogitsRow:
    """One row of logits: its request, and its token's index in the completion."""

    request_id: str
    position: int
    options: RequestOptions


@dataclass(frozen=True, slots=True)
class Mixed:
    """A step's rows as they are solved, kept until their tokens are drawn."""

    parts: list[tuple[list[int], Solved]]
    """Rows that were solved together, by their places in the step."""
    bad: Bool[Tensor, "rows 2"]
    """Whether nothing can be drawn from a row because of the student's, the teacher's logits."""

    @torch.no_grad()
    @np.errstate(all="ignore")
    def trace(self, rows: Sequence[int], tokens: Sequence[int]) -> list[list[float]]:
        """The TRACE_FIELDS of tokens drawn from these rows; log_q is before top-k and top-p."""
        drawn = dict(zip(rows, tokens, strict=True))
        traced: dict[int, list[float]] = {}
        for places, solved in self.parts:
            if drawn.keys().isdisjoint(places):
                continue
            ids = np.array([drawn.get(row, 0) for row in places])
            trace = trace_of(solved, to_device(ids, self.bad.device))
            traced |= zip(places, trace.tolist(), strict=True)
        return [traced[row] for row in rows]


@torch.no_grad()
def mix(
    student_logits: Float[Tensor, "rows wide_vocab"] | None,
    teacher_logits: Float[Tensor, "rows wide_vocab"],
    rows: Sequence[LogitsRow] | None,
    default: MixtureConfig,
    vocab_size: int,
    width: int,
) -> tuple[Float32[Tensor, "rows width"], Mixed]:
    """What vLLM samples from, -inf beyond the `vocab_size` shared ids; and the solved rows.

    `rows=None`: rows that belong to no request's next token (a trial run, log-probabilities of a
    prompt). A row from which nothing can be drawn becomes uniform over the shared ids and is
    flagged. `student_logits=None`: all rows are of one model alone, whose logits the teacher's are.
    """
    if rows is None:
        untruncated = RequestOptions(replace(default, top_k=-1, top_p=1.0))
        rows = [LogitsRow("", 1, untruncated)] * teacher_logits.shape[0]
    teacher = teacher_logits[:, :vocab_size]
    student = None if student_logits is None else student_logits[:, :vocab_size]
    scores = teacher.new_full((len(rows), width), -torch.inf, dtype=torch.float32)
    device = teacher.device
    bad = torch.zeros(len(rows), 2, dtype=torch.bool, device=device)
    parts = []
    for options, group in _groups(rows):
        for part in row_slices(len(group), vocab_size, device):
            places = group[part]
            index = part if len(group) == len(rows) else to_device(np.array(places), device)
            position = np.array([max(rows[place].position, 0) for place in places])
            group_student = None if student is None else student[index]
            solved, group_scores = _solve(
                group_student, teacher[index], to_device(position, device), options
            )
            scores[index, :vocab_size] = group_scores
            bad[index] = _bad(solved)
            parts.append((places, solved))
    return scores, Mixed(parts, bad)


def _groups(rows: Sequence[LogitsRow]) -> list[tuple[RequestOptions, list[int]]]:
    """Rows that can be solved together, by their places, and the options of one of them."""
    groups: dict[tuple[MixtureConfig, str, bool], list[int]] = {}
    for place, row in enumerate(rows):
        options = row.options
        key = (options.mixture, options.mode, options.trace == "full")
        groups.setdefault(key, []).append(place)
    return [(rows[places[0]].options, places) for places in groups.values()]


@np.errstate(all="ignore")
def _solve(
    student: Logits | None, teacher: Logits, position: Positions, options: RequestOptions
) -> tuple[Solved, Scores]:
    """Rows of one configuration, and T log q* up to a constant per row; 0 in bad rows."""
    mixture = options.mixture
    if options.mode != "mixture" or student is None:
        own = student if options.mode == "student" and student is not None else teacher
        solved = solve_single(own, mixture, "student" if options.mode == "student" else "teacher")
        bad = _bad(solved).any(-1, keepdim=True)
        return solved, torch.where(bad, 0.0, own.float())
    pair = make_pair(student, teacher, mixture)
    # ESS costs another pass over the vocabulary
    solved = solve(pair, position, mixture, ess=options.trace == "full")
    scores = log_q(solved)
    if pair.maybe_bad:
        fill_rows(scores, pair.bad, 0.0)
    if mixture.temperature != 1:
        scores.mul_(mixture.temperature)
    return solved, scores


def _bad(solved: Solved) -> Bool[Tensor, "rows 2"]:
    """Whether the student's, the teacher's logits are no distribution."""
    student = tensor_of(solved.models.bad_student)
    teacher = tensor_of(solved.models.bad_teacher)
    return torch.stack([student, teacher], -1)
