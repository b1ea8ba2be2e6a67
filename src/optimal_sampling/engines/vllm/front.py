"""`OptimalSamplingV1`: lists of prompts in, texts and alpha out, by vLLM.

Names of arguments and of outputs are those of the documents this project comes from: `theta` is the student.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, cast

from optimal_sampling.config import MixtureConfig, ModelConfig, PromptConfig, VllmOptions
from optimal_sampling.engines.vllm.engine import VllmEngine
from optimal_sampling.engines.vllm.traces import alpha_summary
from optimal_sampling.errors import ConfigError, PromptError
from optimal_sampling.types import AlphaMethod, Completion, Request, prompt_id
from optimal_sampling.vocabulary import PromptRenderer, RenderedPrompt, Vocabulary

__all__ = ["OptimalSamplingOutput", "OptimalSamplingV1"]

_MIXTURE_OPTIONS = frozenset({"trust_region", "schedule_start", "schedule_end", "schedule_tokens"})
_STATISTICS = {
    "alpha": "alpha",
    "kl_theta": "kl_student",
    "kl_t": "kl_teacher",
    "clamped": "clamped",
}
"""Names in `alpha_stats["per_request"]`, and what they are called in a TokenTrace."""

_DEFAULT_SEQUENCES, _DEFAULT_TOKENS = 256, 8192


@dataclass
class OptimalSamplingOutput:
    """What `OptimalSamplingV1.generate` gives back. Item i belongs to prompt i."""

    generated_texts: list[str]
    """The completions without end and special tokens."""
    generated_ids: list[list[int]]
    """Ids of the completions, the end token included."""
    num_tokens: list[int]
    alpha_stats: dict[str, Any] | None = None
    """Over all tokens: `mean`, `std` (of the population), `min`, `max`, `count`, `clamped` (share of tokens that a
    bound moved), `history` (prompt after prompt). `per_request`: for each prompt `mean` to `count`, and the lists
    `alpha`, `kl_theta`, `kl_t`, `clamped` (1.0 or 0.0) of its tokens. None without `track_alpha_stats`, and for the
    teacher alone."""
    finish_reasons: list[str] = field(default_factory=list)
    """`stop`, `length` or `error`."""
    errors: list[str] = field(default_factory=list)
    """Why a prompt failed, "" where it did not."""


class OptimalSamplingV1:
    """Two models in one vLLM engine; every token drawn from p_theta^(1-alpha) * p_teacher^alpha.

    `model_theta` the same as `model_teacher` means the same weights in both roles, loaded once.
    `gpu_memory_utilization` is the share of the GPU's memory for everything; on a CPU, where it has no meaning,
    `kv_cache_memory_bytes` (1 GiB by default) is what counts.

    Keyword arguments: `draft_tokens` (speculation with the student as draft model), `trust_region` and `schedule_*`
    (see MixtureConfig), `constraint_to_target` with `target_top_k` / `target_top_p`, `trust_remote_code`, and vLLM's
    own arguments by their names (`max_model_len`, `max_num_seqs`, `enforce_eager` ...).

    Raises ConfigError (an option, or something that would be sampled wrongly), ModelError, TokenizerMismatchError,
    MissingDependencyError.
    """

    notes: dict[str, str]
    """What to know of how the models run here."""

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
        draft_tokens: int = 0,
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
            **{name: kwargs.pop(name) for name in _MIXTURE_OPTIONS & kwargs.keys()},
        )
        prompts = PromptConfig(
            chat_template=enable_chat_template,
            student_system_prompt=theta_system_prompt,
            teacher_system_prompt=teacher_system_prompt,
        )
        models = ModelConfig(
            teacher=model_teacher, student=model_theta, trust_remote_code=trust_remote_code
        )
        self.vocabulary = Vocabulary.load(models.student, models.teacher, trust_remote_code)
        self._renderer = PromptRenderer(prompts, self.vocabulary)
        for note in (*self.vocabulary.notes, *self._renderer.notes):
            warnings.warn(note, stacklevel=2)
        self._track = track_alpha_stats
        options = VllmOptions(
            batch_size=int(kwargs.pop("max_num_seqs", _DEFAULT_SEQUENCES)),
            prefill_chunk=int(kwargs.pop("max_num_batched_tokens", _DEFAULT_TOKENS)),
            draft_tokens=draft_tokens,
        )
        settings = {"gpu_memory_utilization": gpu_memory_utilization, **kwargs}
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

        `prompts` are the teacher's; `theta_prompts` the student's where they differ. Temperature divides the logits of
        both models before alpha is solved; `top_p` and `top_k` truncate the mixture. With
        `use_optimal_sampling=False` the teacher alone is sampled. Equal prompts in one list give different texts.

        A prompt that fails (empty, longer than a model's context) leaves an empty row, its reason in `errors`, and a
        warning. Raises ConfigError for an option, EngineError where no prompt can go on.
        """
        _check_prompts(prompts, theta_prompts, max_tokens)
        settings = {item.name: getattr(self._mixture, item.name) for item in fields(MixtureConfig)}
        settings |= {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "force_first_token": force_first_token,
        }
        track = self._track and use_optimal_sampling
        engine = self._engine.view(
            MixtureConfig(**settings),
            mode="mixture" if use_optimal_sampling else "teacher",
            trace="alpha" if track else "off",
        )
        rendered = [
            self._render(prompt, own)
            for prompt, own in zip(prompts, theta_prompts or prompts, strict=True)
        ]
        requests = _requests(rendered, seed, max_tokens)
        places = {(request.id, request.sample_index): place for place, request in requests.items()}
        done: dict[int, Completion] = {}
        for completion in engine.generate(requests.values()):
            done[places[completion.request.id, completion.request.sample_index]] = completion
        errors = [
            each if isinstance(each, str) else done[place].error
            for place, each in enumerate(rendered)
        ]
        _warn_of_failures(errors)
        return self._output([done.get(place) for place in range(len(rendered))], errors, track)

    def _render(self, prompt: str, own: str) -> RenderedPrompt | str:
        """Both prompts, or why there are none."""
        try:
            return self._renderer.render_texts(own, prompt)
        except PromptError as error:
            return str(error)

    def _output(
        self, completions: Sequence[Completion | None], errors: list[str], track: bool
    ) -> OptimalSamplingOutput:
        good = [
            each if each is not None and each.finish_reason != "error" else None
            for each in completions
        ]
        ids = [[] if each is None else list(each.token_ids) for each in good]
        return OptimalSamplingOutput(
            generated_texts=[self.vocabulary.decode(each) for each in ids],
            generated_ids=ids,
            num_tokens=[len(each) for each in ids],
            alpha_stats=_alpha_stats(good) if track else None,
            finish_reasons=["error" if each is None else each.finish_reason for each in good],
            errors=errors,
        )

    def close(self) -> None:
        """End vLLM and free the models. Closing twice is safe; `generate` is then no longer possible."""
        self._engine.close()

    def __enter__(self) -> OptimalSamplingV1:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def _requests(
    rendered: Sequence[RenderedPrompt | str], seed: int, max_tokens: int
) -> dict[int, Request]:
    """Requests by place. The k-th occurrence of a prompt is its sample k."""
    seen: Counter[str] = Counter()
    requests = {}
    for place, prompt in enumerate(rendered):
        if isinstance(prompt, RenderedPrompt):
            name = prompt_id(prompt.student_text, prompt.teacher_text)
            requests[place] = Request(
                name, seen[name], seed, prompt.student_ids, prompt.teacher_ids, max_tokens
            )
            seen[name] += 1
    return requests


def _alpha_stats(completions: Sequence[Completion | None]) -> dict[str, Any]:
    columns = [
        {
            name: [] if each is None else list(each.trace[source])
            for name, source in _STATISTICS.items()
        }
        for each in completions
    ]
    history = [alpha for each in columns for alpha in each["alpha"]]
    clamped = [flag for each in columns for flag in each["clamped"]]
    per_request = [{**alpha_summary(each["alpha"], each["clamped"]), **each} for each in columns]
    return {**alpha_summary(history, clamped), "history": history, "per_request": per_request}


def _check_prompts(
    prompts: Sequence[str], theta_prompts: Sequence[str] | None, max_tokens: int
) -> None:
    for name, given in (("prompts", prompts), ("theta_prompts", theta_prompts)):
        if given is not None and (
            isinstance(given, str) or not all(isinstance(each, str) for each in given)
        ):
            raise ConfigError(f"{name} must be a list of strings")
    if theta_prompts is not None and len(theta_prompts) != len(prompts):
        raise ConfigError(
            f"there are {len(prompts)} prompts but {len(theta_prompts)} theta_prompts"
        )
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")


def _warn_of_failures(errors: Sequence[str]) -> None:
    failed = [(place, error) for place, error in enumerate(errors) if error]
    if failed:
        place, error = failed[0]
        warnings.warn(
            f"{len(failed)} of {len(errors)} prompts failed; prompt {place}: {error}", stacklevel=3
        )
