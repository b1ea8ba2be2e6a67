"""`solve`, `draw` and `trace_of` in one call: logits and noise in, one token per row out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import argmax, tensor_of
from optimal_sampling.distribution.gpu.launch import fused_draft, fused_step, runs_fused
from optimal_sampling.distribution.mixture import (
    Solved,
    draw,
    log_q,
    make_pair,
    row_slices,
    solve,
    solve_single,
    trace_of,
)
from optimal_sampling.distribution.noise import NoiseSource, noise_tensor

__all__ = ["Drawn", "draft", "single_step", "step"]


@dataclass(frozen=True)
class Drawn:
    """One drawn token per row. A row that is bad has token 0 and a trace of NaN."""

    token: Int64[Tensor, " rows"]
    trace: Float32[Tensor, "rows fields"]
    """Of `types.TRACE_FIELDS`. KLs, ESS and entropy describe q before top-k and top-p."""
    bad_student: Bool[Tensor, " rows"]
    """The student's logits hold NaN or +inf, or nothing but -inf."""
    bad_teacher: Bool[Tensor, " rows"]
    log_q: Float32[Tensor, "rows vocab"] | None = None
    """What the token was drawn from, after top-k and top-p; on request. NaN in bad rows."""

    def pack(self) -> Float32[Tensor, "rows columns"]:
        """Token, bad_student, bad_teacher and the trace: one copy to the host. Ids to 2^24."""
        head = torch.stack([self.token, self.bad_student, self.bad_teacher], -1)
        return torch.cat([head.to(torch.float32), self.trace], -1)

    @staticmethod
    def concatenate(parts: Sequence[Drawn]) -> Drawn:
        """Tokens of more rows."""
        kept = [part.log_q for part in parts if part.log_q is not None]
        return Drawn(
            torch.cat([part.token for part in parts]),
            torch.cat([part.trace for part in parts]),
            torch.cat([part.bad_student for part in parts]),
            torch.cat([part.bad_teacher for part in parts]),
            torch.cat(kept) if kept else None,
        )


@torch.no_grad()
def draft(
    student_logits: Float[Tensor, "rows vocab"], noise: NoiseSource, mixture: MixtureConfig
) -> Int64[Tensor, " rows"]:
    """argmax(log p_student + noise): what the student alone would draw with this noise."""
    if runs_fused(student_logits.device):
        return fused_draft(student_logits, noise, mixture.temperature)
    made = noise_tensor(noise, student_logits.shape[1])
    return argmax(torch.add(made, student_logits, alpha=1 / mixture.temperature))


@torch.no_grad()
@np.errstate(all="ignore")
def step(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    noise: NoiseSource,
    position: Int[Tensor, " rows"],
    mixture: MixtureConfig,
    *,
    keep_log_q: bool = False,
) -> Drawn:
    """Draw one token per row from q, proportional to p_student^(1-alpha) * p_teacher^alpha.

    `position` is the index of the token in its completion, 0 for the first. A row's result has the
    same bits whatever rows are beside it. On a GPU the programs of `gpu` do what they cover, where
    Triton is installed.
    """
    rows, vocab = student_logits.shape
    device = student_logits.device
    if runs_fused(device, mixture, keep_log_q):
        return Drawn(*fused_step(student_logits, teacher_logits, noise, position, mixture))
    parts = []
    for part in row_slices(rows, vocab, device):
        pair = make_pair(student_logits[part], teacher_logits[part], mixture)
        solved = solve(pair, position[part], mixture)
        parts.append(_draw_and_trace(solved, noise[part], keep_log_q))
    return parts[0] if len(parts) == 1 else Drawn.concatenate(parts)


@torch.no_grad()
def single_step(
    logits: Float[Tensor, "rows vocab"],
    noise: NoiseSource,
    mixture: MixtureConfig,
    role: str,
) -> Drawn:
    """Draw from the `student` or the `teacher` alone; see `solve_single`."""
    return _draw_and_trace(solve_single(logits, mixture, role), noise)


def _draw_and_trace(solved: Solved, noise: NoiseSource, keep_log_q: bool = False) -> Drawn:
    """The token of every row and its trace."""
    kept = log_q(solved) if keep_log_q else None
    token, drawn_log_q = draw(solved, noise, kept)
    return Drawn(
        token,
        trace_of(solved, token, drawn_log_q),
        tensor_of(solved.models.bad_student),
        tensor_of(solved.models.bad_teacher),
        kept,
    )
