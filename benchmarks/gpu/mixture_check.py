"""The fused step and draft against PyTorch's path on a CPU."""

from __future__ import annotations

import torch

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution import NoiseKeys, draft, keys_tensor, step
from optimal_sampling.distribution.gpu.launch import fused_draft, fused_step

__all__ = ["RULES", "check_rows"]

TOLERANCE = 1e-4
"""Largest accepted difference of a diagnostic, relative and absolute: of float32 logits' sums."""

TYPICAL = MixtureConfig(temperature=0.9)
RULES = {
    "veto": MixtureConfig(alpha_method="veto"),
    "min_p": MixtureConfig(teacher_support_min_p=0.02),
    "likeliest": MixtureConfig(top_k=1),
    "all_three": MixtureConfig(alpha_method="veto", teacher_support_min_p=0.02, top_k=1),
}
"""Mixtures whose programs are others than those of TYPICAL."""


def check_rows(
    rows: int,
    vocab: int,
    device: torch.device,
    dtype: torch.dtype,
    mixture: MixtureConfig = TYPICAL,
) -> None:
    """Compare one batch, with holes in a support and a row that is no distribution.

    Raises AssertionError where tokens, flags or diagnostics differ.
    """
    generator = torch.Generator().manual_seed(rows)
    student = 3 * torch.randn(rows, vocab, generator=generator)
    teacher = student + 1.5 * torch.randn(rows, vocab, generator=generator)
    if rows > 2:
        student[1, ::3] = -torch.inf
        teacher[2, vocab // 2] = torch.nan
    student, teacher = student.to(dtype), teacher.to(dtype)
    keys = NoiseKeys(keys_tensor(range(rows)), torch.arange(rows))
    wanted = step(student, teacher, keys, keys.position, mixture)
    drafted = draft(student, keys, mixture)
    there = NoiseKeys(keys.keys.to(device), keys.position.to(device))
    logits = student.to(device), teacher.to(device)
    found = fused_step(*logits, there, there.position, mixture)
    fields = (wanted.token, wanted.trace, wanted.bad_student, wanted.bad_teacher)
    for mine, reference in zip(found, fields, strict=True):
        torch.testing.assert_close(
            mine.cpu(), reference, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
        )
    greedy = mixture.top_k == 1
    draft_found = fused_draft(logits[0], there, mixture.temperature, greedy=greedy)
    torch.testing.assert_close(draft_found.cpu(), drafted)
