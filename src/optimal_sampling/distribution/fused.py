"""`step` and `draft` on a GPU with the Triton programs of `kernel.py`: nothing of the size [rows, vocab] is made.

Knows how the programs are launched, not what they compute. Never waits for the GPU. Triton is imported when it is
first asked for; without it `step` takes the PyTorch path, and `kernel_note` says so.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.noise import NoiseKeys, scrambled_ids
from optimal_sampling.types import TRACE_FIELDS

__all__ = ["covers", "fused_draft", "fused_step", "kernel_note", "runs_fused"]

PIECE, BLOCK = 1 << 14, 1 << 11
"""Tokens of a row that one program takes, and at a time."""

_LAUNCH, _SMALL = ({"num_warps": warps, "enable_fp_fusion": True} for warps in (8, 1))
_COVERED = {"kl_symmetry", "mirror", "reverse_kl_symmetry", "ess_balance", "fixed", "schedule"}


@cache
def triton_version() -> str | None:
    """Of the Triton that can be imported here, if any."""
    try:
        return str(import_module("triton").__version__)
    except ImportError:
        return None


def kernel_note(device: torch.device, mixture: MixtureConfig | None = None) -> str:
    """One line for a run's summary: how q* is mixed on this device, and why."""
    if device.type != "cuda":
        return f"mixture kernel: PyTorch, because the fused kernel is for GPUs and this is {device.type}"
    version = triton_version()
    if version is None:
        return "mixture kernel: PyTorch, because Triton is not installed"
    if mixture is not None and not covers(mixture):
        return (
            "mixture kernel: PyTorch, because the fused kernel does not cover these mixture options"
        )
    return f"mixture kernel: fused (Triton {version})"


def covers(mixture: MixtureConfig, keep_log_q: bool = False) -> bool:
    """Whether the kernel can do it. What it cannot goes through PyTorch: the methods entropy and trust_region, a
    restriction to the teacher's support, top-k and top-p, and log q itself. Logits 5e11 below their row's largest
    count as -inf in the kernel.
    """
    restricted = mixture.teacher_support_top_k > 0 or mixture.teacher_support_top_p < 1
    truncated = mixture.top_k > 0 or mixture.top_p < 1
    return mixture.alpha_method in _COVERED and not (restricted or truncated or keep_log_q)


def runs_fused(
    device: torch.device, mixture: MixtureConfig | None = None, keep_log_q: bool = False
) -> bool:
    """Whether a step of this mixture, or a draft, on this device is the kernel's."""
    if device.type != "cuda" or triton_version() is None:
        return False
    return mixture is None or covers(mixture, keep_log_q)


def fused_draft(
    student_logits: Float[Tensor, "rows vocab"],
    noise: Float32[Tensor, "rows vocab"] | NoiseKeys,
    temperature: float,
) -> tuple[Int64[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """argmax(log p_student + noise) and its log p_student."""
    kernel, device = _kernel(), student_logits.device
    student, (rows, vocab), pieces = (
        _in_rows(student_logits),
        student_logits.shape,
        _pieces(student_logits),
    )
    token, log_p = (
        torch.zeros(rows, dtype=torch.int64, device=device),
        torch.zeros(rows, device=device),
    )
    if rows:
        drafted = torch.empty(rows, kernel.DRAFTED, pieces, dtype=torch.float64, device=device)
        kernel.draft[rows, pieces](
            student, student.stride(0), *_noise_arguments(noise, vocab), drafted, vocab, 1 / temperature,
            HASHED=isinstance(noise, NoiseKeys), DRAFTED=kernel.DRAFTED, PIECE=PIECE, BLOCK=BLOCK, **_LAUNCH,
        )  # fmt: skip
        kernel.choose[rows,](
            student, student.stride(0), drafted, token, log_p, pieces, 1 / temperature,
            DRAFTED=kernel.DRAFTED, WIDTH=_power_of_two(pieces), **_SMALL,
        )  # fmt: skip
    return token, log_p


def fused_step(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    noise: Float32[Tensor, "rows vocab"] | NoiseKeys,
    position: Int[Tensor, " rows"],
    mixture: MixtureConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`step` for a mixture that the kernel `covers`: token, trace, bad_student and bad_teacher of `Step`."""
    kernel, device = _kernel(), student_logits.device
    student, teacher = _in_rows(student_logits), _in_rows(teacher_logits)
    (rows, vocab), pieces = student.shape, _pieces(student)
    models = (student, teacher, student.stride(0), teacher.stride(0))
    scale, sizes = 1 / mixture.temperature, {"PIECE": PIECE, "BLOCK": BLOCK, **_LAUNCH}
    counts = {"MEASURED": kernel.MEASURED, "SOLVED": kernel.SOLVED, "WIDTH": _power_of_two(pieces)}
    measured, solved, mixed = (
        torch.empty(rows, count, dtype=torch.float64, device=device)
        for count in (kernel.MEASURED * pieces, kernel.SOLVED, kernel.MIXED * pieces)
    )
    token = torch.zeros(rows, dtype=torch.int64, device=device)
    trace = torch.empty(rows, len(TRACE_FIELDS), device=device)
    bad_student, bad_teacher = (torch.empty(rows, dtype=torch.bool, device=device) for _ in "st")
    if rows:
        method, told = _branch(mixture)
        kernel.measure[rows, pieces](
            *models,
            measured,
            vocab,
            scale,
            told[0],
            METHOD=method,
            COLUMNS=kernel.MEASURED,
            **sizes,
        )
        kernel.solve[rows,](
            *models, position, measured, solved, pieces, vocab, scale, *told,
            METHOD=method, MIRROR=mixture.alpha_method == "mirror", FORCE=mixture.force_first_token,
            BLOCK=BLOCK, **_LAUNCH, **counts,
        )  # fmt: skip
        kernel.mix[rows, pieces](
            *models, *_noise_arguments(noise, vocab), solved, mixed, vocab, scale,
            HASHED=isinstance(noise, NoiseKeys), SOLVED=kernel.SOLVED, MIXED=kernel.MIXED, **sizes,
        )  # fmt: skip
        kernel.finish[rows,](
            *models, solved, mixed, token, trace, bad_student, bad_teacher, pieces, scale,
            SOLVED=kernel.SOLVED, MIXED=kernel.MIXED, FIELDS=len(TRACE_FIELDS), WIDTH=counts["WIDTH"], **_SMALL,
        )  # fmt: skip
    return token, trace, bad_student, bad_teacher


def _branch(mixture: MixtureConfig) -> tuple[str, tuple[float, ...]]:
    """What `solve` is told: its branch; the first two alphas to look at, the bounds to solve in, those to clamp to;
    alpha at the first token, later, and from which on.
    """
    method, low, high = mixture.alpha_method, mixture.alpha_min, mixture.alpha_max
    bounds = (1 - high, 1 - low) if method == "mirror" else (low, high)
    looks = [bound for bound in bounds if 0 < bound < 1] or [sum(bounds) / 2]
    line = (mixture.schedule_start, mixture.schedule_end, float(mixture.schedule_tokens))
    if method == "fixed":
        line = (mixture.fixed_alpha, mixture.fixed_alpha, 1.0)
    told = (*(*looks, -1.0)[:2], *bounds, low, high, *line)
    name = {"mirror": "kl_symmetry", "fixed": "schedule"}.get(method, method)
    return name, tuple(float(np.float32(number)) for number in told)


def _kernel() -> ModuleType:
    return import_module("optimal_sampling.distribution.kernel")


def _in_rows(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """The same memory where the logits of a row are neighbours."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _pieces(logits: Float[Tensor, "rows vocab"]) -> int:
    return -(-logits.shape[1] // PIECE)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _noise_arguments(
    noise: Float32[Tensor, "rows vocab"] | NoiseKeys, vocab: int
) -> tuple[Tensor, int, Tensor | None, Tensor | None]:
    """What the programs read noise from, its stride, keys and positions."""
    if isinstance(noise, NoiseKeys):
        return scrambled_ids(vocab, noise.keys.device), 0, noise.keys, noise.position
    return _in_rows(noise), noise.stride(0), None, None
