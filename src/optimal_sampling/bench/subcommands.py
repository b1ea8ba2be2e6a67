"""Options of `optimal-sampling bench`, a class per subcommand. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from optimal_sampling.config import Attention, ModelConfig, expand_user
from optimal_sampling.errors import ConfigError

__all__ = [
    "SUBCOMMANDS",
    "BenchOptions",
    "BytesOptions",
    "DraftsOptions",
    "FleetOptions",
    "GpuOptions",
    "HostOptions",
    "IdentityOptions",
    "MemoryOptions",
    "MethodsOptions",
    "ModelOptions",
    "PairOptions",
    "ScalingOptions",
    "SelfDistilOptions",
    "ServersBenchOptions",
    "Size",
    "SolverOptions",
    "SpeedOptions",
    "TopTokensOptions",
    "Uneven",
    "parse_bench",
    "parse_size",
]

COUNTS = (
    "threads",
    "num_prompts",
    "prefixes",
    "replay_bytes",
    "compared_prompts",
    "repeats",
    "prompt_tokens",
    "new_tokens",
)
FOR_SHAPES = ("same_weights", "acceptance", "prompt_tokens", "new_tokens", "uneven")
"""Options that have no effect on models which are not shapes."""
DEFAULT_MODELS = ModelConfig()
TWO_TOKENIZERS = ModelConfig(student="toy-number-student")
Uneven: TypeAlias = Literal["nothing", "prompts", "all"]


@dataclass(frozen=True)
class Size:
    """A number of texts at once, and the number of new tokens of each."""

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


def _check_output(path: Path) -> None:
    """Raise ConfigError for a path that no file can be written to."""
    if not path.parent.is_dir():
        raise ConfigError(f"output: there is no folder {str(path.parent)!r}; make it first")
    if path.is_dir():
        raise ConfigError(f"output: {str(path)!r} is a folder; name a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"output: {str(path)!r} cannot be written; choose another file")


@dataclass(frozen=True)
class BenchOptions:
    """Options of every subcommand."""

    threads: int | None = None
    """Threads of PyTorch; unset: as the environment says."""
    output: str | None = None
    """File that the line of JSON is written to as well."""

    name: ClassVar[str]
    """The subcommand."""
    function: ClassVar[str]
    """`module:function` in this folder that runs the subcommand."""

    def __post_init__(self) -> None:
        for name in COUNTS:
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if self.output is not None:
            _check_output(expand_user(self.output))

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        """Raise ConfigError where one of the named options differs from its default."""
        defaults = {item.name: item.default for item in fields(self)}
        for name in names:
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} has no effect {reason}; leave it out")


@dataclass(frozen=True)
class ModelOptions(BenchOptions):
    """Options of subcommands that run models, or random weights of a known architecture."""

    models: ModelConfig = DEFAULT_MODELS
    teacher_shape: str | None = None
    """Random weights of a known architecture, such as Qwen2.5-3B, instead of --teacher: for
    timing, no downloads."""
    prompt_tokens: int = 128
    """Shapes: length of the prompts, random ids."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_shape is None:
            self._refuse(FOR_SHAPES, "without --teacher-shape")
        elif replace(self.models, device="auto", dtype="auto") != DEFAULT_MODELS:
            raise ConfigError(
                "shapes and models exclude each other: of the options of models, shapes take "
                "--device and --dtype alone"
            )


@dataclass(frozen=True)
class PairOptions(ModelOptions):
    """Options of subcommands that run two models."""

    student_shape: str | None = None
    """The same for the student. Both or none."""
    same_weights: bool = False
    """Both shapes are one model, loaded once: self-distillation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.teacher_shape is None) != (self.student_shape is None):
            raise ConfigError("teacher_shape and student_shape go together: give both or none")
        if self.same_weights and self.teacher_shape != self.student_shape:
            raise ConfigError(
                "same_weights needs the same shape for --teacher-shape and --student-shape"
            )
        if self.same_weights:
            self._refuse(("acceptance",), "with same_weights, whose drafts are looked up")
        rate = getattr(self, "acceptance", 0)
        if not 0 <= rate <= 1:
            raise ConfigError(f"acceptance must lie in [0, 1], got {rate}")


@dataclass(frozen=True)
class ScalingOptions(PairOptions):
    """Time and memory against the number of prompts, and an oversized batch."""

    name = "scaling"
    function = "costs:run_scaling"
    new_tokens: int = 48
    """Shapes: length of every completion."""
    num_prompts: int = 512
    """Prompts at batch 32, fewer where it is slow; `scaling` starts with a quarter."""
    acceptance: float = 0.9
    """Shapes: share of drafts that counts as accepted. Random weights would accept none."""


@dataclass(frozen=True)
class SpeedOptions(ScalingOptions):
    """q* beside both models alone and Transformers."""

    name = "speed"
    function = "speed:run_speed"
    repeats: int = 5
    """Counted repeats of every row."""
    uneven: Uneven = "nothing"
    """Shapes: whose lengths are random, from an eighth of the given one to all of it. `all`:
    prompts and completions."""


@dataclass(frozen=True)
class DraftsOptions(SpeedOptions):
    """q* by draft length, at batch 1, 8, 32 and 128."""

    name = "drafts"
    function = "speed:run_speed"


@dataclass(frozen=True)
class MethodsOptions(BenchOptions):
    """q* by method and sharpness beside the teacher alone: speed, and drafts accepted."""

    name = "methods"
    function = "methods:run_methods"
    models: ModelConfig = DEFAULT_MODELS
    batches: tuple[int, ...] = (1, 8, 32)
    """Texts at once."""
    num_prompts: int = 128
    """Prompts at the largest batch; fewer where it is slow."""
    repeats: int = 3
    """Counted repeats of every row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batches, default=0) < 1:
            raise ConfigError(f"batches must be numbers of at least 1, got {self.batches}")


@dataclass(frozen=True)
class SelfDistilOptions(ModelOptions):
    """The teacher as its own student: equal prompts, and a solution to look drafts up in."""

    name = "selfdistil"
    function = "speed:run_selfdistil"
    new_tokens: int = 48
    """Shapes: length of every completion."""
    num_prompts: int = 512
    """Eight times the number of prompts that are drawn, which are at least 8."""
    repeats: int = 5
    """Counted repeats of every row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.models.student not in (DEFAULT_MODELS.student, self.models.teacher):
            raise ConfigError("selfdistil runs the teacher in both roles; leave --student out")


@dataclass(frozen=True)
class MemoryOptions(PairOptions):
    """KV caches predicted and measured, requests in flight, preemptions."""

    name = "memory"
    function = "costs:run_memory"
    sizes: tuple[str, ...] = ("8x64", "32x64", "32x160", "256x160")
    """BATCHxTOKENS, such as 8x256 32x512."""
    acceptance: float = 0.9
    """Shapes: share of drafts that counts as accepted. Random weights would accept none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.sizes:
            parse_size(size)


@dataclass(frozen=True)
class IdentityOptions(PairOptions):
    """Texts drawn with and without drafts, compared bit for bit; fails where any differ."""

    name = "identity"
    function = "identity:run"
    new_tokens: int = 48
    """Shapes: length of every completion."""
    num_prompts: int = 1000
    """Prompts to compare."""


@dataclass(frozen=True)
class SolverOptions(BenchOptions):
    """Noise, alpha, draw and diagnostics without a model, on one thread."""

    name = "solver"
    function = "costs:run_solver"
    repeats: int = 5
    """Counted repeats of every row."""


@dataclass(frozen=True)
class HostOptions(BenchOptions):
    """CPU time of a GPU run's rounds without the GPU: what the GPU waits for."""

    name = "host"
    function = "host:run"
    batches: tuple[int, ...] = (1, 8, 32, 128, 256)
    """Texts at once."""
    draft_tokens: tuple[int, ...] = (0, 4)
    """Drafts per row and round; 0: lockstep."""
    acceptance: float = 0.9
    """Share of drafts that counts as accepted."""
    prompt_tokens: int = 128
    """Length of the prompts."""
    new_tokens: int = 256
    """Length of every completion."""
    repeats: int = 3
    """Counted runs of every row."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.batches, default=0) < 1:
            raise ConfigError(f"batches must be numbers of at least 1, got {self.batches}")
        if min(self.draft_tokens, default=-1) < 0:
            raise ConfigError(f"draft_tokens must be numbers from 0 on, got {self.draft_tokens}")
        if not 0 <= self.acceptance <= 1:
            raise ConfigError(f"acceptance must lie in [0, 1], got {self.acceptance}")


@dataclass(frozen=True)
class TopTokensOptions(BenchOptions):
    """What --top-tokens adds to the draw of a token, without a model, on one thread."""

    name = "top-tokens"
    function = "costs:run_top_tokens"
    repeats: int = 5
    """Counted repeats of every row."""
    top_tokens: int = 20
    """Tokens kept of each distribution."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_tokens < 1:
            raise ConfigError(f"top_tokens must be at least 1, got {self.top_tokens}")


@dataclass(frozen=True)
class FleetOptions(BenchOptions):
    """Worker processes beside an ideal fleet, and what their driver costs per record."""

    name = "fleet"
    function = "fleet:run"
    workers: tuple[int, ...] = (1, 2)
    """Workers of the fleets that are compared; on a CPU they share its threads."""
    num_prompts: int = 512
    """Prompts that each fleet serves."""
    batch_size: int = 32
    """Most requests in flight in a worker."""
    repeats: int = 5
    """Counted repeats of every fleet."""
    record_tokens: int = 512
    """Length of the completions whose records the driver writes."""
    rows: tuple[int, ...] = (1000, 30_000)
    """Rows of the runs whose memory is measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("workers", "rows"):
            if min(getattr(self, name), default=0) < 1:
                raise ConfigError(f"{name} must be numbers of at least 1")
        if min(self.batch_size, self.record_tokens) < 1:
            raise ConfigError("batch_size and record_tokens must be at least 1")


@dataclass(frozen=True)
class ServersBenchOptions(BenchOptions):
    """Two servers, asked per token and in rounds, beside vLLM's server of q* and a teacher's."""

    name = "servers"
    function = "servers:run"
    models: ModelConfig = DEFAULT_MODELS
    sequences: tuple[int, ...] = (1, 16, 64)
    """Texts at once."""
    server_top_k: int = 20
    """Likeliest tokens to ask for."""
    repeats: int = 3
    """Counted repeats of every row."""
    student_url: str | None = None
    """Server of the student, and that of the teacher; unset: three of vLLM are started here."""
    teacher_url: str | None = None
    """Server of the teacher."""
    mixture_url: str | None = None
    """Server of q*, `optimal-sampling serve`; unset beside the other two: it is left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.sequences, default=0) < 1:
            raise ConfigError(f"sequences must be numbers of at least 1, got {self.sequences}")
        if self.server_top_k < 1:
            raise ConfigError(f"server_top_k must be at least 1, got {self.server_top_k}")
        pair = self.student_url, self.teacher_url
        if any((*pair, self.mixture_url)) and not all(pair):
            raise ConfigError("give both --student-url and --teacher-url, or no address")


@dataclass(frozen=True)
class GpuOptions(BenchOptions):
    """A table of large shapes, within a budget of time."""

    name = "gpu"
    function = "large_shapes:run"
    device: str = "auto"
    """`cuda`, `cuda:1` ...; auto: the first GPU if there is one. On a CPU `tiny` shapes alone."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    teacher_shape: str = "Qwen2.5-3B"
    """The teacher's architecture."""
    student_shape: str = "Qwen2.5-1.5B"
    """The student's architecture."""
    prompt_tokens: int = 128
    """Length of the prompts, random ids."""
    sizes: tuple[str, ...] = ("32x512", "8x256", "16x512", "16x1024", "8x2048")
    """BATCHxTOKENS, such as 8x256 32x512."""
    huge: str = "256x16384"
    """The size that memory does not hold, of --huge-shape; prompts of half its tokens, so
    memory fills at once."""
    huge_shape: str = "Qwen3-1.7B"
    """The model of --huge, for both roles."""
    huge_share: float = 0.2
    """Share of the budget for --huge; 0 leaves it out."""
    gap_teacher_shape: str = "Qwen2.5-7B"
    """The large model of a pair whose student is cheap."""
    gap_student_shape: str = "Qwen2.5-0.5B"
    """The small one."""
    gap_sizes: tuple[str, ...] = ("32x512",)
    """Sizes of that pair; none leaves it out."""
    attention: Attention = "auto"
    """As of `generate`; varlen and flash_attn insist, and fail where slots would run."""
    budget: float = 540.0
    """Seconds of wall clock, loading included. What does not fit is skipped and named."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in (*self.sizes, *self.gap_sizes, self.huge):
            parse_size(size)
        if not 0 <= self.huge_share < 1:
            raise ConfigError(f"huge_share must lie in [0, 1), got {self.huge_share}")
        if not self.budget > 0:
            raise ConfigError(f"budget must be larger than 0 seconds, got {self.budget}")

    @property
    def models(self) -> ModelConfig:
        """Where the shapes run, and their precision."""
        return ModelConfig(device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class BytesOptions(BenchOptions):
    """Two tokenizers: forward passes, and what the tolerance changes in q*."""

    name = "bytes"
    function = "byte_level:run"
    models: ModelConfig = TWO_TOKENIZERS
    num_prompts: int = 64
    """Problems that are answered."""
    tolerances: tuple[float, ...] = (0.01, 0.05, 0.03, 0.003, 0.001)
    """Values of --byte-tolerance; the first is also measured with drafts."""
    prefixes: int = 1000
    """Places in the texts at which q* is compared with that of the reference."""
    reference: float = 0.0
    """Tolerance of the reference. At 0 the sequences of tokens that are followed grow exponentially
    with the text."""
    replay_bytes: int = 10
    """Bytes of every text that are compared."""
    compared_prompts: int = 16
    """Problems of the comparison with tokens."""
    repeats: int = 3
    """Counted repeats of the comparison with tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tolerances or not all(0 < value <= 0.05 for value in self.tolerances):
            raise ConfigError(f"tolerances must lie in (0, 0.05], got {self.tolerances}")


_KINDS: tuple[type[BenchOptions], ...] = (
    SpeedOptions,
    DraftsOptions,
    MethodsOptions,
    SelfDistilOptions,
    ScalingOptions,
    MemoryOptions,
    IdentityOptions,
    SolverOptions,
    HostOptions,
    FleetOptions,
    TopTokensOptions,
    BytesOptions,
    ServersBenchOptions,
    GpuOptions,
)
SUBCOMMANDS = {kind.name: kind for kind in _KINDS}
DEFAULT = "speed"


def parse_bench(arguments: Sequence[str], program: str) -> BenchOptions:
    """The options of a command line; without a subcommand, those of `speed`.

    Raises ConfigError, and SystemExit(2) for an option that the subcommand does not have.
    """
    import tyro

    first = arguments[0] if arguments else ""
    if not first or (first.startswith("-") and first not in ("-h", "--help")):
        arguments = [DEFAULT, *arguments]
    options: BenchOptions = tyro.extras.overridable_config_cli(
        {name: (str(kind.__doc__), kind()) for name, kind in SUBCOMMANDS.items()},
        prog=program,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    return options
