"""`OptimalSamplingV1`: lists of prompts in, texts and alpha out, by vLLM.

In names of arguments and outputs, `theta` is the student and `t` the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from optimal_sampling.api.batch import (
    MIXTURE_OPTIONS,
    BatchSampler,
    prompt_lists,
    taken,
    whole_number,
)
from optimal_sampling.api.notebook import ShownRow, rows_html, token_reader
from optimal_sampling.config import (
    DraftTokens,
    MixtureConfig,
    ModelConfig,
    PromptConfig,
    VllmOptions,
)
from optimal_sampling.engines.vllm.engine import VllmEngine
from optimal_sampling.engines.vllm.trace_store import alpha_summary
from optimal_sampling.errors import ConfigError
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.spans import TokenReader
from optimal_sampling.types import AlphaMethod, Completion

__all__ = ["OptimalSamplingOutput", "OptimalSamplingV1"]

_STATISTICS = {
    "alpha": "alpha",
    "kl_theta": "kl_student",
    "kl_t": "kl_teacher",
    "clamped": "clamped",
    "curvature": "curvature",
}
"""Names in `alpha_stats["per_request"]`, and what they are called in a TokenTrace."""

_COLOURED = {"alpha": "alpha", "kl_student": "kl_theta", "kl_teacher": "kl_t"}
"""Metrics of coloured text, and their names in `alpha_stats["per_request"]`."""

_DEFAULT_SEQUENCES, _DEFAULT_TOKENS = 256, 8192


@dataclass
class OptimalSamplingOutput:
    """Result of `OptimalSamplingV1.generate`. Item i belongs to prompt i."""

    generated_texts: list[str]
    """The completions without end and special tokens."""
    generated_ids: list[list[int]]
    """Ids of the completions, the end token included."""
    num_tokens: list[int]
    alpha_stats: dict[str, Any] | None = None
    """Over all tokens: `mean`, `weighted_mean` (alpha where the models differ: each token with its
    `curvature` as weight), `std` (of the population), `min`, `max`, `count`, `clamped` (share of
    tokens that a bound moved), `history` (prompt after prompt). `per_request`: for each prompt
    `mean` to `count`, and the lists `alpha`, `kl_theta`, `kl_t`, `clamped` (1.0 or 0.0) and
    `curvature` (Var_q of the models' log ratio) of its tokens. None without `track_alpha_stats`,
    and for the teacher alone."""
    finish_reasons: list[str] = field(default_factory=list)
    """`stop`, `length` or `error`."""
    errors: list[str] = field(default_factory=list)
    """Why a prompt failed, "" where it did not."""
    _reader: TokenReader | None = field(default=None, repr=False, compare=False)
    """The texts of the tokens, for notebooks. A pickled output has none."""

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_reader": None}

    def _repr_html_(self) -> str:
        rows = map(self._row, range(len(self.generated_ids)))
        return rows_html(self._reader, len(self.generated_ids), rows)

    def _row(self, row: int) -> ShownRow:
        """A completion; its tokens have numbers where alpha was tracked."""
        statistics = self.alpha_stats["per_request"][row] if self.alpha_stats else {}
        ids = self.generated_ids[row]
        return ShownRow(
            f"prompt {row}: {self.errors[row] or self.finish_reasons[row]}",
            ids,
            {name: statistics[own] for name, own in _COLOURED.items() if own in statistics},
            ends=self.finish_reasons[row] == "stop" and len(ids) > 0,
        )


class OptimalSamplingV1(BatchSampler):
    """Two models in one vLLM engine; every token drawn from p_theta^(1-alpha) * p_teacher^alpha.

    The teacher comes first: `model_teacher` and `prompts` are the teacher's, `model_theta` and
    `theta_prompts` the student's. `OptimalSamplingModel` has the opposite order, the student first.

    `model_theta` the same as `model_teacher` means the same weights in both roles, loaded once.
    `gpu_memory_utilization` is the share of the GPU's memory for everything; on a CPU, where it has
    no meaning, `kv_cache_memory_bytes` (1 GiB by default) is what counts.

    Keyword arguments: `draft_tokens` (speculation with the student as draft model; "auto": on a CPU
    where at most 4 sequences run at once), `check_models`
    (`auto`, `on`, `off`: comparison of both models with Transformers at the start), `trust_region`
    and `schedule_*` (see MixtureConfig), `constraint_to_target` with `target_top_k` /
    `target_top_p`, `trust_remote_code`, and vLLM's own arguments by their names (`max_model_len`,
    `max_num_seqs`, `enforce_eager` ...).

    Raises ConfigError (an option, or something that would be sampled wrongly), ModelError,
    TokenizerMismatchError, MissingDependencyError.
    """

    _engine: VllmEngine

    def __init__(
        self,
        model_teacher: str,
        model_theta: str,
        alpha_method: str = "kl_symmetry",
        fixed_alpha: float = 0.5,
        alpha_min: float = 0.5,
        alpha_max: float = 1.0,
        teacher_system_prompt: str | None = None,
        theta_system_prompt: str | None = None,
        enable_chat_template: bool = False,
        track_alpha_stats: bool = True,
        gpu_memory_utilization: float = 0.5,
        *,
        draft_tokens: DraftTokens = 0,
        constraint_to_target: bool = False,
        target_top_k: int = -1,
        target_top_p: float = 1.0,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> None:
        if not constraint_to_target and (target_top_k, target_top_p) != (-1, 1.0):
            raise ConfigError("target_top_k and target_top_p need constraint_to_target=True")
        self._mixture = MixtureConfig(
            alpha_method=cast(AlphaMethod, alpha_method),
            fixed_alpha=fixed_alpha,
            alpha_min=alpha_min,
            alpha_max=alpha_max,
            teacher_support_top_k=target_top_k,
            teacher_support_top_p=target_top_p,
            **taken(kwargs, MIXTURE_OPTIONS),
        )
        prompts = PromptConfig(
            chat_template=enable_chat_template,
            student_system_prompt=theta_system_prompt,
            teacher_system_prompt=teacher_system_prompt,
        )
        models = ModelConfig(
            teacher=model_teacher,
            student=model_theta,
            trust_remote_code=trust_remote_code,
            granularity="token",
        )
        super().__init__(models)
        self._renderer = PromptRenderer(prompts, self.vocabulary)
        self._warn_once(self._renderer.notes, stacklevel=3)
        self._track = track_alpha_stats
        own = {name: value for name, value in kwargs.items() if name not in MIXTURE_OPTIONS}
        options, settings = _engine_options(draft_tokens, gpu_memory_utilization, own)
        self._engine = VllmEngine.load(
            models, self._mixture, options, self.vocabulary, settings=settings
        )
        self.notes = self._engine.notes()

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        use_optimal_sampling: bool = True,
        theta_prompts: Sequence[str] | None = None,
        *,
        seed: int = 0,
        force_first_token: bool = False,
    ) -> OptimalSamplingOutput:
        """One completion per prompt, in the order of the prompts.

        `prompts` are the teacher's; `theta_prompts` the student's where they differ. Temperature
        divides the logits of both models before alpha is solved; `top_p` and `top_k` truncate the
        mixture. With `use_optimal_sampling=False` the teacher alone is sampled. Equal prompts in
        one list give different texts.

        A prompt that fails (empty, longer than a model's context) leaves an empty row, its reason
        in `errors`, and a warning. Raises ConfigError for an option, EngineError where no prompt
        can go on.
        """
        teacher, student = prompt_lists(prompts, theta_prompts, "theta_prompts")
        max_tokens = whole_number("max_tokens", max_tokens, least=1)
        seed = whole_number("seed", seed)
        self._check_open()
        mixture = self._mixture_of_call(temperature, top_p, top_k, force_first_token)
        track = self._track and use_optimal_sampling
        engine = self._engine.view(
            mixture,
            mode="mixture" if use_optimal_sampling else "teacher",
            trace="alpha" if track else "off",
        )
        pairs = zip(student, teacher, strict=True)
        rows = self._sample(engine, self._renderer, pairs, seed, max_tokens)
        ids = [list(row.token_ids) for row in rows]
        return OptimalSamplingOutput(
            generated_texts=[self.vocabulary.decode(each) for each in ids],
            generated_ids=ids,
            num_tokens=[len(each) for each in ids],
            alpha_stats=_alpha_stats(rows) if track else None,
            finish_reasons=[row.finish_reason for row in rows],
            errors=[row.error for row in rows],
            _reader=token_reader(self.vocabulary),
        )


def _engine_options(
    draft_tokens: DraftTokens, gpu_memory_utilization: float, settings: dict[str, Any]
) -> tuple[VllmOptions, dict[str, Any]]:
    """Our options, and the rest of vLLM's own arguments."""
    options = VllmOptions(
        batch_size=_taken_number(settings, "max_num_seqs", _DEFAULT_SEQUENCES),
        prefill_chunk=_taken_number(settings, "max_num_batched_tokens", _DEFAULT_TOKENS),
        draft_tokens=draft_tokens,
        check_models=settings.pop("check_models", "auto"),
    )
    return options, {"gpu_memory_utilization": gpu_memory_utilization, **settings}


def _taken_number(settings: dict[str, Any], name: str, default: int) -> int:
    return whole_number(name, settings.pop(name, default), least=1)


def _alpha_stats(rows: Sequence[Completion]) -> dict[str, Any]:
    columns = [
        {name: list(row.trace[source]) for name, source in _STATISTICS.items()} for row in rows
    ]
    together = {name: [value for each in columns for value in each[name]] for name in _STATISTICS}
    per_request = [{**_summary(each), **each} for each in columns]
    return {**_summary(together), "history": together["alpha"], "per_request": per_request}


def _summary(columns: Mapping[str, list[float]]) -> dict[str, float]:
    return alpha_summary(columns["alpha"], columns["clamped"], columns["curvature"])
