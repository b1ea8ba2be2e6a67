"""`step` and `draft` on a GPU with the Triton programs of `programs`: no tensor [rows, vocab].

How the programs are launched, without waiting for the GPU. Triton is imported when it is first
asked for; without it `step` takes the PyTorch path, and `kernel_note` says so.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.arrays import Logits, Positions, Tokens, cuts
from optimal_sampling.distribution.noise import NoiseKeys, NoiseSource, scrambled_ids
from optimal_sampling.types import TRACE_FIELDS

__all__ = [
    "COLUMNS",
    "LANES",
    "SIZES",
    "TRACED",
    "Sizes",
    "fused_draft",
    "fused_step",
    "kernel_note",
    "runs_fused",
    "triton_version",
]


class Sizes(NamedTuple):
    """How the work is cut."""

    piece: int
    """Tokens of a row that one program takes."""
    block: int
    """Tokens that it takes at a time."""
    passes: int = 3
    """Alphas beyond the first that all pieces of a row are evaluated at side by side; rows that
    need more are worked on by one program each."""
    stages: int = 3
    """Tiles on their way from memory at a time."""

    @property
    def of_pieces(self) -> dict[str, int]:
        """Options of programs that take a piece."""
        return {"PIECE": self.piece, "BLOCK": self.block, "STAGES": self.stages, **_LAUNCH}


SIZES = Sizes(1 << 13, 1 << 10)

LANES = 4
"""Neighbouring numbers of a block that are added up in float32: those of one thread."""

COLUMNS = 16
"""Numbers that a program leaves for the next one, in float64."""

TRACED = (
    "alpha",
    "clamped",
    "kl_student",
    "kl_teacher",
    "ess_student",
    "ess_teacher",
    "entropy",
    "log_p_student",
    "log_p_teacher",
    "log_q",
    "fallback",
    "curvature",
    "vetoed",
    "kl_student_restricted",
    "kl_teacher_restricted",
    "log_p_student_restricted",
)
"""The fields of the trace that `finish` writes, in the order of its names for their columns."""

_LAUNCH, _SMALL = ({"num_warps": warps, "enable_fp_fusion": True} for warps in (8, 1))
_COVERED = {"kl_symmetry", "mirror", "reverse_kl_symmetry", "ess_balance"}
_COVERED |= {"fixed", "schedule", "veto"}


@cache
def triton_version() -> str | None:
    """Of the Triton that can be imported here, if any."""
    try:
        return str(import_module("triton").__version__)
    except ImportError:
        return None


def kernel_note(device: torch.device, mixture: MixtureConfig | None = None) -> str:
    """One line for a run's summary: how q* is mixed on this device, and why."""
    version = triton_version()
    if device.type != "cuda":
        why = f"the fused kernel is for GPUs and this is {device.type}"
    elif version is None:
        why = "Triton is not installed"
    elif mixture is not None and not covers(mixture):
        why = "the fused kernel does not cover these mixture options"
    else:
        return f"mixture kernel: fused (Triton {version})"
    return f"mixture kernel: PyTorch, because {why}"


def covers(mixture: MixtureConfig, keep_log_q: bool = False) -> bool:
    """Whether the programs can do it; what they cannot goes through PyTorch.

    They have not the methods entropy, trust_region, interleaved and arithmetic, a teacher's support
    by top-k and top-p, a truncation but top_k=1, log q itself, nor fields of the trace beyond
    TRACED. Logits 5e11 below their row's largest count as -inf.
    """
    ranked = cuts(mixture.teacher_support_top_k, mixture.teacher_support_top_p)
    truncated = mixture.top_k != 1 and cuts(mixture.top_k, mixture.top_p)
    known = mixture.alpha_method in _COVERED and set(TRACE_FIELDS) <= set(TRACED)
    return known and not (ranked or truncated or keep_log_q)


def runs_fused(
    device: torch.device, mixture: MixtureConfig | None = None, keep_log_q: bool = False
) -> bool:
    """Whether a step of this mixture, or a draft, on this device is the programs'."""
    if device.type != "cuda" or triton_version() is None:
        return False
    return mixture is None or covers(mixture, keep_log_q)


def fused_draft(
    student_logits: Logits,
    noise: NoiseSource,
    temperature: float,
    sizes: Sizes = SIZES,
    *,
    greedy: bool = False,
) -> Tokens:
    """argmax(log p_student + noise); without the noise where `greedy`."""
    programs = _programs()
    batch = _batch(student_logits, student_logits, temperature, sizes)
    rows = student_logits.shape[0]
    device = student_logits.device
    token = torch.zeros(rows, dtype=torch.int64, device=device)
    if rows:
        drafted = _buffer(rows, batch.pieces, device)
        programs.draft[rows, batch.pieces](
            batch,
            _noise(noise, batch.vocab),
            drafted,
            HASHED=isinstance(noise, NoiseKeys),
            GREEDY=greedy,
            **sizes.of_pieces,
        )
        width = _power_of_two(batch.pieces)
        programs.choose[rows,](drafted, batch.pieces, token, WIDTH=width, **_SMALL)
    return token


def fused_step(
    student_logits: Logits,
    teacher_logits: Logits,
    noise: NoiseSource,
    position: Positions,
    mixture: MixtureConfig,
    sizes: Sizes = SIZES,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`step` of a mixture that `covers` accepts: token, trace, bad_student, bad_teacher."""
    programs = _programs()
    batch = _batch(student_logits, teacher_logits, mixture.temperature, sizes)
    rows = student_logits.shape[0]
    device = student_logits.device
    outputs = programs.Outputs(
        token=torch.zeros(rows, dtype=torch.int64, device=device),
        trace=torch.empty(rows, len(TRACE_FIELDS), device=device),
        bad_student=torch.empty(rows, dtype=torch.bool, device=device),
        bad_teacher=torch.empty(rows, dtype=torch.bool, device=device),
    )
    if rows:
        if mixture.support_min_p > 0:
            batch = _restricted(batch, rows, device, mixture.support_min_p, sizes)
        solved = _solved(batch, position, mixture, sizes)
        mixed = _buffer(rows, batch.pieces, device)
        programs.mix[rows, batch.pieces](
            batch,
            _noise(noise, batch.vocab),
            solved,
            mixed,
            HASHED=isinstance(noise, NoiseKeys),
            GREEDY=mixture.top_k == 1,
            **sizes.of_pieces,
        )
        width = _power_of_two(batch.pieces)
        greedy = mixture.top_k == 1
        programs.finish[rows,](batch, solved, mixed, outputs, GREEDY=greedy, WIDTH=width, **_SMALL)
    return outputs.token, outputs.trace, outputs.bad_student, outputs.bad_teacher


def _restricted(batch: Any, rows: int, device: torch.device, min_p: float, sizes: Sizes) -> Any:
    """The batch within the teacher's support by min-p."""
    programs = _programs()
    surveyed = _buffer(rows, batch.pieces, device)
    programs.survey[rows, batch.pieces](batch, surveyed, **sizes.of_pieces)
    support = _buffer(rows, 1, device)
    width = _power_of_two(batch.pieces)
    programs.restrict[rows,](
        surveyed, batch.pieces, support, math.log(min_p), WIDTH=width, **_SMALL
    )
    return batch._replace(support=(support,))


def _solved(batch: Any, position: Positions, mixture: MixtureConfig, sizes: Sizes) -> Tensor:
    """What `solve` leaves for `mix` and `finish`: alpha of every row, log Z of both models."""
    programs = _programs()
    rows, device = len(position), position.device
    method, settings = _settings(mixture)
    passes = sizes.passes if method == "kl_symmetry" else 0
    work = programs.Work(
        measured=_buffer(rows, batch.pieces, device),
        searched=_buffer(max(1, passes), rows, device),
        refined=_buffer(max(1, passes) * rows, batch.pieces, device),
    )
    width = _power_of_two(batch.pieces)
    grid = (rows, batch.pieces)
    programs.measure[grid](batch, work.measured, settings, METHOD=method, **sizes.of_pieces)
    for number in range(1, passes + 1):
        programs.refine[grid](batch, work, settings, PASS=number, WIDTH=width, **sizes.of_pieces)
    solved = _buffer(rows, 1, device)
    programs.solve[rows,](
        batch,
        position,
        work,
        solved,
        settings,
        METHOD=method,
        PASSES=passes,
        WIDTH=width,
        BLOCK=sizes.block,
        STAGES=sizes.stages,
        **_LAUNCH,
    )
    return solved


def _settings(mixture: MixtureConfig) -> tuple[str, Any]:
    """The branch of `solve`, and its `Settings`."""
    method = mixture.alpha_method
    low, high = (mixture.alpha_min, mixture.alpha_max) if mixture.has_bounds else (0.0, 1.0)
    bounds = (1 - high, 1 - low) if method == "mirror" else (low, high)
    looks = [bound for bound in bounds if 0 < bound < 1] or [sum(bounds) / 2]
    constant = {"fixed": mixture.fixed_alpha, "veto": 0.0}.get(method)
    start = mixture.schedule_start if constant is None else constant
    end = mixture.schedule_end if constant is None else constant
    settings = _programs().Settings(
        first=looks[0],
        second=looks[1] if len(looks) > 1 else -1.0,
        low=bounds[0],
        high=bounds[1],
        alpha_min=low,
        alpha_max=high,
        start=start,
        end=end,
        tokens=mixture.schedule_tokens if constant is None else 1.0,
        mirror=method == "mirror",
        force_first=mixture.force_first_token,
    )
    branches = {"mirror": "kl_symmetry", "fixed": "schedule", "veto": "schedule"}
    branch = branches.get(method, method)
    return branch, settings._make(float(np.float32(number)) for number in settings)


def _programs() -> ModuleType:
    return import_module("optimal_sampling.distribution.gpu.programs")


def _batch(student: Tensor, teacher: Tensor, temperature: float, sizes: Sizes) -> Any:
    """`Batch`, with the same memory where the logits of a row are neighbours."""
    student, teacher = (x if x.stride(-1) == 1 else x.contiguous() for x in (student, teacher))
    return _programs().Batch(
        student=student,
        teacher=teacher,
        student_stride=student.stride(0),
        teacher_stride=teacher.stride(0),
        vocab=student.shape[1],
        pieces=-(-student.shape[1] // sizes.piece),
        scale=1 / temperature,
        support=(),
    )


def _buffer(rows: int, pieces: int, device: torch.device) -> Tensor:
    return torch.empty(rows, pieces, COLUMNS, dtype=torch.float64, device=device)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _noise(noise: NoiseSource, vocab: int) -> Any:
    """`Noise`: where the programs read it, its stride, keys and positions."""
    programs = _programs()
    if isinstance(noise, NoiseKeys):
        ids = scrambled_ids(vocab, noise.keys.device)
        return programs.Noise(ids, 0, noise.keys, noise.position)
    noise = noise if noise.stride(-1) == 1 else noise.contiguous()
    return programs.Noise(noise, noise.stride(0), keys=noise, position=noise)  # not read
