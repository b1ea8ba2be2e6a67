"""Options of `optimal-sampling bench`. Knows nothing of torch: the command line reads them for `--help`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from optimal_sampling.config import ModelConfig
from optimal_sampling.errors import ConfigError

__all__ = ["BenchOptions", "Size", "parse_size"]

What = Literal["speed", "drafts", "selfdistil", "scaling", "memory", "identity", "solver", "gpu"]


@dataclass(frozen=True)
class Size:
    """So many texts at once, of so many new tokens each."""

    batch: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens}"


def parse_size(text: str) -> Size:
    """`32x512` -> batch 32, 512 tokens each. Raises ConfigError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip(), re.ASCII)
    if match is None:
        raise ConfigError(f"a size is BATCHxTOKENS, such as 32x512; got {text!r}")
    return Size(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class BenchOptions:
    """Measure on this machine, in one run: ratios of interleaved repeats, medians."""

    what: Annotated[What, tyro.conf.Positional] = "speed"
    """speed: q* beside both models alone and Transformers. drafts: by draft length. selfdistil: the teacher as its own
    student. scaling: by number of prompts. memory: caches and what is in flight. identity: speculative = lockstep, bit
    for bit. solver: the mixture without a model. gpu: the table of large shapes, within --budget."""
    models: ModelConfig = field(default_factory=ModelConfig)
    teacher_shape: str | None = None
    """Random weights of a known architecture, such as Qwen2.5-3B, instead of --teacher: for timing, no downloads."""
    student_shape: str | None = None
    """The same for the student. Both or none."""
    same_weights: bool = False
    """Both shapes are one model, loaded once: self-distillation."""
    acceptance: float = 0.9
    """Shapes: share of drafts that counts as accepted. Random weights would accept none."""
    prompt_tokens: int = 128
    """Shapes: length of the prompts, random ids."""
    new_tokens: int = 48
    """Shapes: length of every completion."""
    sizes: tuple[str, ...] = ()
    """memory and gpu: BATCHxTOKENS, such as 8x256 32x512; unset: the command's own."""
    huge: str = "256x16384"
    """gpu: the size that memory does not hold, of --huge-shape; prompts of half its tokens, so memory fills at once."""
    huge_shape: str = "Qwen3-1.7B"
    """gpu: the model of --huge, for both roles."""
    budget: float = 540.0
    """gpu: seconds of wall clock, loading included. What does not fit is skipped and named."""
    num_prompts: int | None = None
    """Prompts at batch 32, fewer where it is slow; `scaling` starts with a quarter. Unset: 512, `identity` 1000."""
    repeats: int = 5
    """Counted repeats of every row."""
    threads: int | None = None
    """Threads of PyTorch; unset: as the environment says."""
    output: str | None = None
    """File that the line of JSON is written to as well."""

    def __post_init__(self) -> None:
        counts = (self.repeats, self.threads, self.num_prompts, self.prompt_tokens, self.new_tokens)
        if min(1 if count is None else count for count in counts) < 1:
            raise ConfigError(
                "num_prompts, repeats, threads, prompt_tokens and new_tokens must be at least 1"
            )
        if not 0 <= self.acceptance <= 1:
            raise ConfigError(f"acceptance must lie in [0, 1], got {self.acceptance}")
        if not self.budget > 0:
            raise ConfigError(f"budget must be larger than 0 seconds, got {self.budget}")
        if self.output is not None and not Path(self.output).parent.is_dir():
            raise ConfigError(
                f"output: there is no folder {str(Path(self.output).parent)!r}; make it first"
            )
        self._check_shapes()
        for text in (*self.sizes, self.huge):
            parse_size(text)

    def _check_shapes(self) -> None:
        named = [shape for shape in (self.teacher_shape, self.student_shape) if shape is not None]
        default = ModelConfig()
        if len(named) == 1:
            raise ConfigError("teacher_shape and student_shape go together: give both or none")
        if named and (self.models.teacher, self.models.student) != (
            default.teacher,
            default.student,
        ):
            raise ConfigError(
                "shapes and models exclude each other: give --teacher and --student, or both shapes"
            )
        if self.same_weights and (len(named) < 2 or named[0] != named[1]):
            raise ConfigError(
                "same_weights needs the same shape for --teacher-shape and --student-shape"
            )

    @property
    def shapes(self) -> tuple[str, str] | None:
        """(teacher, student), where shapes were asked for."""
        if self.teacher_shape is None or self.student_shape is None:
            return None
        return self.teacher_shape, self.student_shape

    def prompts(self, default: int = 512) -> int:
        """The number asked for, or the command's own."""
        return default if self.num_prompts is None else self.num_prompts

    def sizes_or(self, default: tuple[Size, ...]) -> tuple[Size, ...]:
        """The sizes asked for, or the command's own."""
        return tuple(map(parse_size, self.sizes)) or default
