"""Options of `evaluate`, and the `generate` config of one checkpoint on one benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from optimal_sampling.config import (
    DataConfig,
    EngineOptions,
    GenerateConfig,
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    PromptConfig,
    RunConfig,
    VllmOptions,
    expand_user,
)
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Hint

__all__ = ["EvaluateConfig"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Score checkpoints on benchmarks of mathematics.

    Every checkpoint answers every question alone, as with `generate --mode student`, in a run
    folder for each checkpoint and benchmark. A second call on the same --output-dir goes on where
    the first one ended.
    """

    checkpoint_dir: str | None = None
    """Evaluate every complete checkpoint in this folder and below it."""
    extra_models: tuple[str, ...] = ()
    """More models: folders, hub ids, `toy-student` or `toy-teacher`."""
    benchmarks: tuple[str, ...] = ()
    """gsm8k, math500, aime24, aime25, amc23, minerva, olympiadbench, synthetic, or names given with
    --benchmark-file. Unset: those of --benchmark-file, or the first seven."""
    benchmark_file: tuple[str, ...] = ()
    """NAME=PATH: a local file (or downloaded snapshot) of a benchmark, or of questions of your own
    with the columns `problem` and `answer`."""
    data_dir: str | None = None
    """Folder to look for NAME.jsonl, NAME.json, NAME.parquet or a folder NAME before the hub is."""
    allow_other_questions: bool = False
    """Take a benchmark whose questions are not the ones that its name stands for."""
    output_dir: str = "outputs/evaluation"
    """Folder of the run folders and of results.json and results.md."""
    samples: int = 1
    """Completions per question."""
    pass_at: tuple[int, ...] = ()
    """The k of pass@k and maj@k, at most --samples. Unset: --samples."""
    baseline: str | None = None
    """Checkpoint that the others are compared with, by the name in the tables. Unset: the first of
    --extra-models, or else the first checkpoint."""
    num_examples: int | None = None
    """Take the first n questions of each benchmark."""
    engine: Literal["local", "vllm"] = "local"
    """`local` runs Transformers models in this process, `vllm` runs them in vLLM."""
    batch_size: int = 32
    """Most requests in flight at once."""
    kv_memory_gib: float | None = None
    """Budget of the KV cache in GiB; unset: a share of the memory free after loading."""
    tensor_parallel_size: int = 1
    """Devices that `vllm` splits a model over. `local` computes on one, and says so."""
    workers: int = 1
    """More than 1 is refused: one process evaluates on one device."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto: bfloat16 on a GPU, float32 on a CPU."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1` ...; auto: the first GPU if there is one."""
    temperature: float = 0.6
    """Divisor of the logits. 0: the likeliest token at each position."""
    top_p: float = 0.95
    """Nucleus to draw from; 1: all tokens."""
    top_k: int = -1
    """Draw from the k likeliest tokens; -1: all."""
    max_new_tokens: int = 8192
    """Most tokens per completion. A completion that needs more counts as wrong."""
    chat_template: bool = True
    """Render prompts with the model's own chat template."""
    system_prompt: str | None = None
    """System prompt."""
    thinking: Literal["on", "off", "default"] = "default"
    """Passed to chat templates that know a thinking mode."""
    template: str | None = None
    """The user turn, with {problem}. Unset: the benchmark's own, which asks for a box."""
    hint: Hint = "none"
    """Show the model a solution, as a control: the `right` one, a `wrong` one (the right one with
    another final answer), or an `other` one (of the next question)."""
    seed: int = 0
    """Of every draw."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Off unless you have read that code."""
    resume: bool = True
    """Go on where an earlier call ended; always on."""
    verbose: bool = False
    """Show the first right and the first wrong completion of each run."""

    def __post_init__(self) -> None:
        if self.workers != 1:
            raise ConfigError(
                f"--workers {self.workers}: one process evaluates on one device. For more devices "
                "start one process on each, with its own --benchmarks or --extra-models and the "
                "same --output-dir, then one with all of them, which writes the tables"
            )
        if not self.resume:
            raise ConfigError("--no-resume: finished runs are kept; choose another --output-dir")
        for name in ("samples", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_samples()
        if self.template is not None and "{problem}" not in self.template:
            raise ConfigError("--template has no {problem}: all questions would be one prompt")
        object.__setattr__(self, "output_dir", str(expand_user(self.output_dir)))
        self.files  # noqa: B018 - raises for what is no NAME=PATH
        self.run_config()

    def _check_samples(self) -> None:
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(
                f"--samples {self.samples} with --temperature 0 are {self.samples} equal "
                "completions; choose a temperature above 0, or --samples 1"
            )
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                raise ConfigError(
                    f"--pass-at {k} needs {max(k, 1)} samples per question, and there are "
                    f"{self.samples}; give --samples {max(k, 1)} or a k from 1 to {self.samples}"
                )

    @property
    def files(self) -> dict[str, str]:
        """Paths of --benchmark-file by name. Raises ConfigError."""
        found: dict[str, str] = {}
        for text in self.benchmark_file:
            name, equals, path = text.partition("=")
            if not name or not equals or not path or "/" in name:
                raise ConfigError(f"--benchmark-file must be NAME=PATH, got {text!r}")
            if name in found:
                raise ConfigError(f"--benchmark-file names {name!r} twice")
            found[name] = path
        return found

    @property
    def counts(self) -> tuple[int, ...]:
        """The k of pass@k and maj@k."""
        return tuple(sorted({*self.pass_at})) or (self.samples,)

    def run_config(self) -> GenerateConfig:
        """What the runs of all checkpoints and benchmarks have in common. Raises ConfigError."""
        is_greedy = self.temperature == 0
        return GenerateConfig(
            models=ModelConfig(
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.trust_remote_code,
            ),
            mixture=MixtureConfig(
                temperature=1.0 if is_greedy else self.temperature,
                top_p=1.0 if is_greedy else self.top_p,
                top_k=1 if is_greedy else self.top_k,
            ),
            data=DataConfig(num_examples=self.num_examples, samples_per_prompt=self.samples),
            prompt=PromptConfig(
                chat_template=self.chat_template,
                thinking=self.thinking,
                student_system_prompt=self.system_prompt,
                teacher_system_prompt=self.system_prompt,
                hint=self.hint,
                hint_to="student",
            ),
            run=RunConfig(
                mode="student",
                seed=self.seed,
                max_new_tokens=self.max_new_tokens,
                token_lists=False,
            ),
            engine=self._engine_options(),
        )

    def _engine_options(self) -> EngineOptions:
        batch, memory = self.batch_size, self.kv_memory_gib
        if self.engine == "local":
            return LocalOptions(batch_size=batch, kv_memory_gib=memory)
        return VllmOptions(
            batch_size=batch,
            kv_memory_gib=memory,
            tensor_parallel_size=self.tensor_parallel_size,
        )

    def settings(self) -> Mapping[str, object]:
        """What a score depends on beside checkpoint and questions, by name."""
        names = (
            "samples temperature top_p top_k max_new_tokens chat_template system_prompt thinking "
            "hint engine dtype device seed num_examples"
        )
        return {name: getattr(self, name) for name in names.split()}
