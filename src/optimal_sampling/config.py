"""All options, as frozen dataclasses that check their values. No torch, no files.

The command line is derived from them: a field is a flag, and the docstring under it its help text.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, Union, cast, get_args, get_origin, get_type_hints

from optimal_sampling.errors import ConfigError, did_you_mean
from optimal_sampling.types import UNBOUNDED_METHODS, AlphaMethod, Hint, Mode

__all__ = [
    "ENGINES",
    "MIN_TEMPERATURE",
    "Attention",
    "Checked",
    "DataConfig",
    "DraftTokens",
    "EngineOptions",
    "FleetConfig",
    "GenerateConfig",
    "LocalOptions",
    "MixtureConfig",
    "ModelConfig",
    "PromptConfig",
    "Regrade",
    "RunConfig",
    "ServersOptions",
    "Stage",
    "ToyOptions",
    "VerifyConfig",
    "VerifyOptions",
    "VllmOptions",
    "engine_options",
    "expand_user",
    "parse_slice",
]


@dataclass(frozen=True)
class Checked:
    """Base of the option classes, which checks that a value has the type of its field.

    NumPy scalars become plain numbers and paths become text. Raises ConfigError.
    """

    def __post_init__(self) -> None:
        hints = _hints(cast(Hashable, type(self)))
        for field in fields(self):
            value = _converted(field.name, hints[field.name], getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def _check_range(
        self, names: str, low: float, high: float = math.inf, *, above: bool = False
    ) -> None:
        """Values from `low` (with `above`: larger than it) to `high`; None is unset."""
        for name in names.split():
            value = getattr(self, name)
            if value is None or (low <= value <= high and not (above and value == low)):
                continue
            bounds = f"be larger than {low}" if above else f"be at least {low}"
            if high < math.inf:
                bounds = f"lie in {'(' if above else '['}{low}, {high}]"
            raise ConfigError(f"{name} must {bounds}, got {value}")

    def _check_path(self, name: str) -> None:
        path = getattr(self, name)
        if not path or "\0" in path:
            raise ConfigError(f"{name} must be a name without NUL characters, got {path!r}")


@functools.cache
def _hints(options: Hashable) -> dict[str, Any]:
    return get_type_hints(options)


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def _converted(name: str, hint: Any, value: Any) -> Any:
    """The value as one of the plain types of the hint. Raises ConfigError."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value  # a NumPy scalar
    plain = os.fspath(plain) if isinstance(plain, os.PathLike) else plain
    if get_origin(hint) is tuple and isinstance(plain, list | tuple):
        return tuple(_converted(name, get_args(hint)[0], each) for each in plain)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    texts = [text for kind in kinds if get_origin(kind) is Literal for text in get_args(kind)]
    if isinstance(plain, str) and (str in kinds or plain in texts):
        return str(plain)
    if type(plain) is int and float in kinds:
        return float(plain)
    if type(plain) in kinds or (isinstance(plain, Checked) and isinstance(plain, hint)):
        return plain
    wanted = [_TYPE_NAMES[kind] for kind in kinds if kind in _TYPE_NAMES]
    wanted += [f"one of {', '.join(texts)}"] if texts else []
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        wanted = [f"a list, each {_TYPE_NAMES.get(kind, f'of the class {kind.__name__}')}"]
    expected = " or ".join(wanted) or f"of the class {hint.__name__}"
    raise ConfigError(f"{name} must be {expected}, got {value!r}")


def parse_slice(text: str) -> slice:
    """`START:STOP:STEP`, any part of which may be left out. Raises ConfigError.

    Negative parts are refused: which rows a shard holds must not depend on the dataset's length.
    """
    match = re.fullmatch(r"(\d*):(\d*)(?::(\d*))?", text.strip(), re.ASCII)
    if match is None:
        raise ConfigError(
            "data_slice must be START:STOP:STEP, each 0 or more, such as 0::8 or 100:200; "
            f"got {text!r}"
        )
    start, stop, step = (int(part) if part else None for part in match.groups())
    if step == 0:
        raise ConfigError(f"data_slice has a step of 0: {text!r}")
    return slice(start or 0, stop, step or 1)


MIN_TEMPERATURE = 1e-3
"""Down to which float32 gives the distribution: the total variation to float64, between tokens
whose logits of 30 differ by about the temperature, is below 1e-5 on a CPU and below 1e-3 on a GPU,
where logits are divided before they are compared. Logits of float32 have no digits for less."""


@dataclass(frozen=True)
class MixtureConfig(Checked):
    """The distribution of every token: q ∝ p_student^(1-alpha) * p_teacher^alpha, or another."""

    alpha_method: AlphaMethod = "kl_symmetry"
    """How alpha, the weight of the teacher, is chosen at each token. `veto` is the student within
    the teacher's plausible tokens; `interleaved` the student's token where it is plausible, else
    one of the teacher's; `arithmetic` a weighted mean of both probabilities."""
    fixed_alpha: float = 0.5
    """alpha of the method `fixed`."""
    alpha_min: float = 0.5
    """Smallest alpha; what a method chooses below it is clamped."""
    alpha_max: float = 1.0
    """Largest alpha; what a method chooses above it is clamped."""
    trust_region: float = 0.05
    """Method `trust_region`: alpha is the largest with KL(q || p_student) at most this, in nats."""
    schedule_start: float = 1.0
    """Method `schedule`: alpha at the first token."""
    schedule_end: float = 0.5
    """Method `schedule`: alpha from token `schedule_tokens` on."""
    schedule_tokens: int = 256
    """Method `schedule`: number of tokens over which alpha goes linearly from start to end."""
    veto_min_p: float = 0.1
    """Method `veto`: plausible are tokens with p_teacher >= this times the teacher's largest."""
    interleaved_top_k: int = 25
    """Method `interleaved`: plausible are the teacher's k likeliest tokens."""
    interleaved_min_p: float | None = None
    """Method `interleaved`: plausible are tokens with p_teacher >= this times the teacher's
    largest, instead of the k likeliest."""
    arithmetic_weight: float = 0.5
    """Method `arithmetic`: the teacher's share of q."""
    teacher_support_top_k: int = -1
    """Restrict both models to the teacher's k likeliest tokens before alpha is solved; -1: off."""
    teacher_support_top_p: float = 1.0
    """Restrict both models to the teacher's nucleus of this mass before alpha is solved; 1: off."""
    teacher_support_min_p: float | None = None
    """Restrict both models to tokens with p_teacher >= this times the teacher's largest before
    alpha is solved; unset: off. With top-k and top-p: to what all of them keep."""
    force_first_token: bool = False
    """Draw the first token from the teacher alone (alpha = 1)."""
    temperature: float = 1.0
    """Divisor of both models' logits, before anything else."""
    top_p: float = 1.0
    """Nucleus of q to draw from, after mixing; 1: all of q."""
    top_k: int = -1
    """Draw from the k likeliest tokens of q, after mixing; -1: all of q."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("fixed_alpha alpha_min alpha_max schedule_start schedule_end", 0, 1)
        self._check_range("arithmetic_weight", 0, 1)
        self._check_range("top_p teacher_support_top_p", 0, 1, above=True)
        self._check_range("veto_min_p interleaved_min_p teacher_support_min_p", 0, 1, above=True)
        self._check_range("interleaved_top_k", 1)
        self._check_range("trust_region", 0)
        self._check_range("schedule_tokens", 1)
        self._check_range("temperature", 0, above=True)
        if not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature must be finite and at least {MIN_TEMPERATURE}, got "
                f"{self.temperature}: float32 rounds probabilities away below it. For the "
                "likeliest token of q use --top-k 1 (top_k=1)"
            )
        for name in ("top_k", "teacher_support_top_k"):
            value = getattr(self, name)
            if value != -1 and value < 1:
                raise ConfigError(f"{name} must be -1 (off) or at least 1, got {value}")
        if self.alpha_min > self.alpha_max:
            raise ConfigError(
                f"alpha_min ({self.alpha_min}) is larger than alpha_max ({self.alpha_max})"
            )
        self._check_method()

    def _check_method(self) -> None:
        """ConfigError where bounds of alpha and the method contradict each other."""
        for name in ("alpha_min", "alpha_max"):
            value = getattr(self, name)
            if self.alpha_method in UNBOUNDED_METHODS and value != getattr(type(self), name):
                raise ConfigError(
                    f"{name} ({value}) does nothing with alpha_method {self.alpha_method}, which "
                    f"has no bounds; leave {name} out"
                )
        is_fixed = self.alpha_method == "fixed"
        if is_fixed and not self.alpha_min <= self.fixed_alpha <= self.alpha_max:
            raise ConfigError(
                f"fixed_alpha ({self.fixed_alpha}) lies outside [alpha_min, alpha_max] = "
                f"[{self.alpha_min}, {self.alpha_max}] and would be clamped at every token; "
                "move the bounds"
            )

    @property
    def is_geometric(self) -> bool:
        """Whether q ∝ p_student^(1-alpha) * p_teacher^alpha for some alpha."""
        return self.alpha_method not in ("interleaved", "arithmetic")

    @property
    def has_bounds(self) -> bool:
        """Whether alpha_min and alpha_max apply."""
        return self.alpha_method not in UNBOUNDED_METHODS

    @property
    def support_min_p(self) -> float:
        """Both models are restricted to p_teacher >= this times its largest; 0: they are not."""
        veto = self.veto_min_p if self.alpha_method == "veto" else 0.0
        return max(veto, self.teacher_support_min_p or 0.0)

    @property
    def has_support(self) -> bool:
        """Whether both models are restricted to a support that the teacher gives."""
        by_rank = self.teacher_support_top_k > 0 or self.teacher_support_top_p < 1
        return by_rank or self.support_min_p > 0


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The two models, and how they are loaded."""

    teacher: str = "toy-teacher"
    """The larger or better informed model: a folder, a hub id, or the built-in `toy-teacher`."""
    student: str = "toy-student"
    """The model to be trained: a folder, a hub id, or the built-in `toy-student`.
    The same as the teacher is loaded once."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher from the hub."""
    student_revision: str | None = None
    """Branch, tag or commit of a student from the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` ...; auto: the first GPU if there is one."""
    load_in_4bit: bool = False
    """Load the weights in 4 bits (needs the extra `4bit`)."""
    allow_unused_weights: bool = False
    """Load a model whose files hold weights that its architecture does not use."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Off unless you have read that code."""
    granularity: Literal["auto", "token", "byte"] = "auto"
    """What is drawn one by one: `token`, which needs one tokenizer, or `byte`, for models with
    different tokenizers; auto: bytes where the tokenizers differ (docs/tokenizers.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_path("teacher")
        self._check_path("student")

    @property
    def revisions(self) -> tuple[str | None, str | None]:
        """Of the student and the teacher."""
        return self.student_revision, self.teacher_revision


DraftTokens = int | Literal["auto"]
Attention = Literal["auto", "varlen", "flash_attn", "sdpa"]


@dataclass(frozen=True)
class EngineOptions(Checked):
    """Options of one engine: they change speed and memory, and none but `byte_tolerance` changes
    the distribution of tokens."""

    name: ClassVar[str]
    """Value of `--engine`."""
    engine_class: ClassVar[str]
    """`module:Class`, imported on use: an `engines.base.Engine` with a classmethod
    `load(models, mixture, options, vocabulary, mode) -> Engine`."""
    byte_engine_class: ClassVar[str] = ""
    """As `engine_class`, the engine for two different tokenizers; empty: none."""
    fixed: ClassVar[frozenset[str]] = frozenset()
    """Options that a loaded engine cannot change."""
    loads_models: ClassVar[bool] = True
    """The engine reads the weights of the two models."""
    facts_function: ClassVar[str] = ""
    """`module:function` from the options and a mode to what a run must not change beside its
    options, by name; empty: nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = {field.name for field in fields(self)}
        self._check_range(" ".join(names & {"batch_size", "prefill_chunk"}), 1)
        self._check_range(" ".join(names & {"kv_memory_gib"}), 0, above=True)
        drafts = getattr(self, "draft_tokens", 0)
        if drafts != "auto" and drafts < 0:
            raise ConfigError(f"draft_tokens must be 'auto' or at least 0, got {drafts!r}")


@dataclass(frozen=True)
class LocalOptions(EngineOptions):
    """The engine `local`: Transformers models in this process."""

    name = "local"
    engine_class = "optimal_sampling.engines.local.engine:LocalEngine"
    byte_engine_class = "optimal_sampling.engines.bytes.engine:ByteEngine"
    fixed = frozenset({"attention", "batch_invariant", "fused_layers"})

    batch_size: int = 32
    """Most requests in flight at once. Fewer run where the memory budget does not hold so many."""
    kv_memory_gib: float | None = None
    """Budget of both models' KV caches in GiB; unset: a share of the memory free after loading."""
    prefill_chunk: int = 2048
    """Most prompt tokens that one forward pass takes beside the tokens being decoded."""
    draft_tokens: DraftTokens = "auto"
    """Tokens drafted ahead per round: `auto` measures what pays, 0 is plain decoding.
    Never changes what is drawn."""
    attention: Attention = "auto"
    """`auto`: on a GPU in half precision Flash Attention over pages of memory (PyTorch's `varlen`,
    else the `flash_attn` package), otherwise PyTorch's SDPA over slots; the notes say why."""
    batch_invariant: bool = True
    """On a CPU in float32: shapes under which a row's logits do not depend on its batch."""
    fused_layers: bool = True
    """On a GPU over pages: Llama-like layers with merged projections and fused kernels, where they
    give the stock model's logits; the notes say why not."""
    top_tokens: int = 0
    """Keep, for every token, ids and log-probabilities of the k likeliest tokens of student,
    teacher and q: soft targets (docs/records.md). 0: none."""
    byte_tolerance: float = 0.01
    """Two tokenizers: a model is not run after a token whose share of its probability of the text
    is below this. What is given up is in the records; 0: exact, and slow (docs/tokenizers.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("top_tokens", 0)
        self._check_range("byte_tolerance", 0, 0.05)


@dataclass(frozen=True)
class VllmOptions(EngineOptions):
    """The engine `vllm`: both models in vLLM (needs the extra `vllm`)."""

    name = "vllm"
    engine_class = "optimal_sampling.engines.vllm.engine:VllmEngine"
    fixed = frozenset(
        {
            "kv_memory_gib",
            "prefill_chunk",
            "draft_tokens",
            "max_model_len",
            "gpu_memory_utilization",
            "tensor_parallel_size",
            "quantization",
            "check_models",
            "vllm",
        }
    )

    batch_size: int = 32
    """Most requests in flight at once."""
    kv_memory_gib: float | None = None
    """Budget of both models' KV caches in GiB; unset: vLLM's own."""
    prefill_chunk: int = 2048
    """Most tokens of one step of vLLM. At least what one token of every request in flight takes."""
    draft_tokens: DraftTokens = "auto"
    """Tokens that the student drafts per step; `auto` is 5 on a CPU up to a batch size of 4, where
    they were measured to pay, and 0 elsewhere. A server's `auto` goes by the requests of a step."""
    max_model_len: int | None = None
    """Longest text, prompt included; unset: the shorter of the models' contexts."""
    gpu_memory_utilization: float | None = None
    """Share of the GPU's memory that may be used; unset: vLLM's default."""
    tensor_parallel_size: int = 1
    """GPUs that the layers of both models are split over; on a CPU, processes."""
    quantization: str | None = None
    """Quantization of the teacher's weights, by vLLM's name; unset: what its config says."""
    check_models: Literal["auto", "on", "off"] = "auto"
    """Compare both models' log-probabilities with Transformers when vLLM starts; auto: of models
    below 2 billion parameters on a CPU, 8 billion on a GPU. Not of GPTQ's and AWQ's weights."""
    vllm: tuple[str, ...] = ()
    """Other arguments of vLLM as NAME=VALUE, such as `block_size=32` or `enforce_eager=true`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("max_model_len tensor_parallel_size", 1)
        self._check_range("gpu_memory_utilization", 0, 1, above=True)
        _ = self.settings

    @property
    def settings(self) -> dict[str, Any]:
        """vLLM's own arguments, by its names, of the options that are set.

        A value of --vllm is JSON where it can be read as such, and text otherwise. Raises
        ConfigError.
        """
        names = ("max_model_len", "gpu_memory_utilization", "quantization")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.tensor_parallel_size != 1:
            given["tensor_parallel_size"] = self.tensor_parallel_size
        for item in self.vllm:
            name, equals, text = item.partition("=")
            name = name.strip().removeprefix("--").replace("-", "_")
            if not equals or not name:
                raise ConfigError(f"vllm must be NAME=VALUE, such as block_size=32; got {item!r}")
            if name in {field.name for field in fields(self)} | given.keys():
                raise ConfigError(f"vllm: {name} is an option of its own, or is given twice")
            given[name] = _json_or_text(text)
        return given

    @property
    def drafts_per_step(self) -> int:
        """`draft_tokens` as a number; 0 for `auto`, which is decided when vLLM starts."""
        return 0 if self.draft_tokens == "auto" else self.draft_tokens

    @property
    def tokens_per_step(self) -> int:
        """Most tokens of one step: a prefill chunk, or every request with its drafts."""
        return max(self.prefill_chunk, self.batch_size * (self.drafts_per_step + 1))


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class ServersOptions(EngineOptions):
    """The engine `servers`: each model behind a server that nobody has to change (needs the extra
    `servers`). --teacher and --student give the tokenizers."""

    name = "servers"
    engine_class = "optimal_sampling.engines.servers.engine:ServersEngine"
    fixed = frozenset(
        {
            "teacher_url",
            "student_url",
            "teacher_model",
            "student_model",
            "teacher_api_key_env",
            "student_api_key_env",
            "teacher_api_key_file",
            "student_api_key_file",
            "server_timeout",
            "server_retry_seconds",
        }
    )
    loads_models = False
    facts_function = "optimal_sampling.engines.servers.engine:served_facts"

    teacher_url: tuple[str, ...] = ()
    """Address of the teacher's server, such as http://127.0.0.1:9001; several of the same model
    share the work."""
    student_url: tuple[str, ...] = ()
    """Address of the student's server, or several."""
    teacher_model: str | None = None
    """Name of the teacher at its server; unset: the only model that it has."""
    student_model: str | None = None
    """Name of the student at its server; unset: the only model that it has."""
    teacher_api_key_env: str | None = None
    """Environment variable with the API key of the teacher's server."""
    student_api_key_env: str | None = None
    """Environment variable with the API key of the student's server."""
    teacher_api_key_file: str | None = None
    """File with the API key of the teacher's server, in place of a variable."""
    student_api_key_file: str | None = None
    """File with the API key of the student's server."""
    server_top_k: int = 20
    """Likeliest tokens to ask for; -1: the whole vocabulary, which is exact, and slow."""
    tv_tolerance: float | None = None
    """Ask for more tokens where q may be further than this from the exact q, in total variation
    (docs/servers.md); unset: --server-top-k at every token."""
    draft_tokens: DraftTokens = "auto"
    """Tokens that the student's server drafts per round; `auto` measures what pays, 0 is one token
    per round. Never changes what is drawn."""
    batch_size: int = 32
    """Most requests in flight at once."""
    server_timeout: float = 60.0
    """Seconds after which an answer of a server is no longer waited for."""
    server_retry_seconds: float = 300.0
    """Seconds during which a request that a server does not answer is sent again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("tv_tolerance server_timeout server_retry_seconds", 0, above=True)
        if self.server_top_k != -1 and self.server_top_k < 1:
            raise ConfigError(
                f"server_top_k must be -1 (all tokens) or at least 1, got {self.server_top_k}"
            )
        for role in ("teacher", "student"):
            object.__setattr__(self, f"{role}_url", tuple(self.urls(role)))
            if getattr(self, f"{role}_api_key_env") and getattr(self, f"{role}_api_key_file"):
                raise ConfigError(f"{role}_api_key_env and {role}_api_key_file: give one of them")

    def urls(self, role: str) -> list[str]:
        """Addresses of a role's servers: a list may hold several in one text, with commas."""
        texts = getattr(self, f"{role}_url")
        return [url.strip() for text in texts for url in text.split(",") if url.strip()]


@dataclass(frozen=True)
class ToyOptions(EngineOptions):
    """The engine `toy`: two tables of logits, for tests. It has no options."""

    name = "toy"
    engine_class = "optimal_sampling.engines.toy:ToyEngine"
    loads_models = False


ENGINES: dict[str, type[EngineOptions]] = {
    options.name: options for options in (LocalOptions, VllmOptions, ServersOptions, ToyOptions)
}
"""All engines, by name."""


def engine_options(name: str) -> type[EngineOptions]:
    """Options class of an engine. Raises ConfigError for an unknown name."""
    if name not in ENGINES:
        known = ", ".join(ENGINES)
        raise ConfigError(
            f"unknown engine {name!r}{did_you_mean(name, ENGINES)}; the engines are: {known}"
        )
    return ENGINES[name]


@dataclass(frozen=True)
class DataConfig(Checked):
    """The rows that become prompts."""

    dataset: str = "synthetic"
    """A JSONL or Parquet file, a folder of such files, a hub id, or `synthetic` (arithmetic)."""
    split: str | None = None
    """Split of a hub dataset (unset: `train`, or the only one) or of a folder's files."""
    subset: str | None = None
    """Subset of a hub dataset (its config name), or a subfolder of a folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    prompt_column: str | None = None
    """Column with the prompt; unset: the first of problem, question, prompt, messages."""
    answer_column: str | None = None
    """Column with the reference answer; unset: `answer` where there is one."""
    num_examples: int | None = None
    """Take the first n rows of the dataset (100 of `synthetic` where unset)."""
    data_slice: str | None = None
    """Take rows START:STOP:STEP after --num-examples; `0::8` is the first of eight shards.
    Each slice has its own file of records, so eight commands can share one --output-dir."""
    samples_per_prompt: int = 1
    """Completions per prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("num_examples samples_per_prompt", 1)
        self._check_path("dataset")
        if self.data_slice is not None:
            parse_slice(self.data_slice)


@dataclass(frozen=True)
class PromptConfig(Checked):
    """How a row becomes the prompts of the two models."""

    chat_template: bool = True
    """Render prompts with each model's own chat template."""
    thinking: Literal["on", "off", "default"] = "default"
    """Passed to chat templates that know a thinking mode; the same for both models."""
    student_system_prompt: str | None = None
    """System prompt of the student."""
    teacher_system_prompt: str | None = None
    """System prompt of the teacher."""
    student_template: str = "{problem}"
    """The student's user turn, with {problem}, {answer}, {solution} or any other column."""
    teacher_template: str = "{problem}"
    """The teacher's user turn; {answer} or {solution} show it what the student does not see."""
    hint: Hint = "none"
    """Show a solution in a prompt, as a control: the `right` one, a `wrong` one (the right one with
    another final answer), or an `other` one (of the next row). It stands where the template has
    {hint}, {solution}, {answer} or {privileged_context}, else after the user turn."""
    hint_to: Literal["teacher", "student"] = "teacher"
    """Whose prompt shows the hint."""
    literal_control_tokens: bool = False
    """Encode control tokens in the texts of a row, such as <|im_end|>, as ordinary text."""


@dataclass(frozen=True)
class RunConfig(Checked):
    """The run: its folder, its seed, and what is recorded."""

    output_dir: str = "outputs/run"
    """Run folder. A second call on the same folder goes on where the first one ended."""
    mode: Mode = "mixture"
    """What tokens are drawn from: the mixture, or as a baseline the student or the teacher alone.
    One model alone is the only one that is loaded, and the options of alpha have no effect."""
    seed: int = 0
    """A token is a function of this seed, its prompt, sample and position, and the two models."""
    max_new_tokens: int = 256
    """Most tokens per completion."""
    token_lists: bool = True
    """Keep alpha and both KLs of every token in the records."""
    byte_lists: bool = False
    """Two tokenizers: keep alpha and both KLs of every byte in the records."""
    max_attempts: int = 3
    """Later calls try a failed prompt again until it has failed this often."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("max_new_tokens max_attempts", 1)
        self._check_path("output_dir")
        object.__setattr__(self, "output_dir", str(expand_user(self.output_dir)))


@dataclass(frozen=True)
class FleetConfig(Checked):
    """Several engines that share the work of a run (docs/fleet.md)."""

    workers: int | Literal["auto"] | None = None
    """Processes with an engine each: a number, or `auto` for one per GPU. Unset: one engine, in
    this process. On a CPU they share its threads and its memory."""
    ray: str | None = None
    """Workers on the machines of a Ray cluster (needs the extra `ray`): HOST:PORT of its head,
    `auto` for the one on this machine, or `local` for one that ends with the run
    (docs/scale.md)."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; unset: --tensor-parallel-size, or 1. With --ray also a part of one."""
    worker_timeout: float | None = None
    """Seconds without progress after which a worker is started again. Loading models does not
    count. Unset: chosen from what rounds take, at least 60."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers != "auto":
            self._check_range("workers", 1)
        if self.ray is not None:
            self._check_ray(self.ray)
        self._check_range("gpus_per_worker", 0, above=True)
        self._check_range("worker_timeout", 0, _LONGEST_TIMEOUT, above=True)
        for name in ("gpus_per_worker", "worker_timeout") if not self.is_used else ():
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} is about workers, and there are none; give workers too")

    @property
    def is_used(self) -> bool:
        """Whether there are workers beside this process."""
        return self.workers is not None or self.ray is not None

    @property
    def has_other_machines(self) -> bool:
        """Whether workers may be on other machines than the driver."""
        return self.ray not in (None, "local")

    def _check_ray(self, address: str) -> None:
        if address not in ("local", "auto") and not re.fullmatch(r"[^\s/]+:\d+", address):
            raise ConfigError(
                f"ray must be local, auto, or HOST:PORT of the cluster's head, got {address!r}: "
                "this command runs on one of the cluster's machines, so ray:// has no place here"
            )


_LONGEST_TIMEOUT = 7 * 86400  # seconds; what select() and alarm() take has a limit
_MOST_GIB = 1 << 20  # of an address space


@dataclass(frozen=True)
class VerifyConfig(Checked):
    """The grading of completions as they are finished."""

    verify: str | None = None
    """Grade completions: `math` (needs the extra `eval`), `synthetic`, or a function of your own,
    FILE.py:function. Verdicts are written beside the records."""
    reference: str | None = None
    """Column with the reference answer to grade with; unset: --answer-column, or one of the usual
    names."""
    verify_workers: int | None = None
    """Processes that grade; unset: half of the cores, at most 8."""
    verify_timeout: float = 10.0
    """Most seconds for one completion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("verify_workers", 1)
        self._check_range("verify_timeout", 0, _LONGEST_TIMEOUT, above=True)


Regrade = Literal["none", "failed", "all"]


@dataclass(frozen=True)
class VerifyOptions(Checked):
    """The grading of the completions of run folders."""

    grader: str = "math"
    """`math` (needs the extra `eval`), `synthetic`, or a function of your own, FILE.py:function."""
    reference: str | None = None
    """Column with the reference answer; unset: the run's --answer-column, or one of the usual
    names."""
    workers: int | None = None
    """Processes that grade; unset: half of the cores, at most 8."""
    timeout: float = 10.0
    """Most seconds for one completion."""
    memory_gib: float = 4.0
    """Most memory of a process, in GiB."""
    regrade: Regrade = "none"
    """What to grade again: completions on which the grader failed (took too long, died, raised an
    error), or all. Those whose record, reference or grader has changed are graded again anyway."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("workers", 1)
        self._check_range("timeout", 0, _LONGEST_TIMEOUT, above=True)
        self._check_range("memory_gib", 0, _MOST_GIB, above=True)


@dataclass(frozen=True)
class Stage(Checked):
    """A pass over the prompts that have no correct completion yet (docs/escalation.md)."""

    name: str
    """Letters, digits, `-` and `_`; in every record of the stage."""
    mode: Mode = "mixture"
    """What tokens are drawn from. Only the models that take part are loaded."""
    tries: int = 1
    """Most completions of a prompt. Each is drawn after the verdict on the one before."""
    hint: Hint | None = None
    """Solution that a prompt shows, as --hint; unset: that of the run."""
    mixture: MixtureConfig = MixtureConfig()
    """The distribution of every token; of one model alone temperature, top-k and top-p."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"[\w-]+", self.name, re.ASCII):
            raise ConfigError(
                f"the name of a stage is made of letters, digits, - and _, got {self.name!r}"
            )
        self._check_range("tries", 1)
        if self.mixture.top_k == 1 and self.tries > 1:
            raise ConfigError(
                f"with top_k 1 all {self.tries} tries are the same text; give tries 1, or a "
                "temperature below 1 in place of top_k"
            )


def expand_user(path: str | Path) -> Path:
    """The path with the home folder in place of a `~` at its start; the `~` of `./~/x` is a folder.

    The latter becomes absolute, so that it is not expanded when this is called again.
    """
    expanded = Path(os.path.expanduser(path))
    return expanded.absolute() if str(expanded).startswith("~") else expanded


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """All options of `generate`: prompts of a dataset in, records of q* out."""

    models: ModelConfig = ModelConfig()
    mixture: MixtureConfig = MixtureConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    run: RunConfig = RunConfig()
    verify: VerifyConfig = VerifyConfig()
    fleet: FleetConfig = FleetConfig()
    engine: EngineOptions = LocalOptions()
    stages: tuple[Stage, ...] = ()
    """Passes over the prompts that have no correct completion yet; none: one pass over all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages:
            self._check_stages()

    def _check_stages(self) -> None:
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two stages have the name {name!r}; records are told by it")
        if self.verify.verify is None:
            raise ConfigError(
                "stages stop at the first completion that is correct, and nothing says which are; "
                "name a grader: --verify math, --verify synthetic or --verify FILE.py:function"
            )
        if self.run.mode != "mixture":
            raise ConfigError(
                f"--mode {self.run.mode} is for a run without stages; each stage has its own mode"
            )

    @property
    def shard(self) -> str:
        """Name of the file of records: one per data slice, so that slices can share a folder."""
        if self.data.data_slice is None:
            return "main"
        part = parse_slice(self.data.data_slice)
        return f"slice-{part.start}-{'' if part.stop is None else part.stop}-{part.step}"
