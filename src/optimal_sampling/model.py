"""`OptimalSamplingModel`: lists of prompts in, tensors out. The Python front door to the local engine.

Knows nothing of datasets, records or runs; `optimal_sampling.generate` is for those. Names of arguments and of outputs
are those of the documents this project comes from: `theta` is the student, `t` the teacher.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, PromptConfig
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.types import AlphaMethod, Completion, Request, prompt_id
from optimal_sampling.vocabulary import PromptError, PromptRenderer, RenderedPrompt, Vocabulary

if TYPE_CHECKING:
    from optimal_sampling.engines.base import Engine

__all__ = ["OptimalSamplingModel", "PerToken", "SamplingOutput"]

Thinking = Literal["on", "off", "default"]

_ENGINE_OPTIONS = frozenset(item.name for item in fields(LocalOptions))
_MIXTURE_OPTIONS = frozenset({"trust_region", "schedule_start", "schedule_end", "schedule_tokens"})
_MODEL_OPTIONS = frozenset({"load_in_4bit", "trust_remote_code"})
_PROMPT_OPTIONS = frozenset(
    {
        "student_system_prompt",
        "theta_system_prompt",
        "teacher_system_prompt",
        "enable_chat_template",
        "thinking",
    }
)
_LOADER_OPTIONS = frozenset(
    {
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_storage",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "low_cpu_mem_usage",
        "quantization_config",
        "variant",
    }
)
_OPTIONS = _ENGINE_OPTIONS | _MIXTURE_OPTIONS | _MODEL_OPTIONS | _PROMPT_OPTIONS | _LOADER_OPTIONS

_CAPTURED = {"theta": "student_logits", "t": "teacher_logits"}
_DIAGNOSTICS = {
    "kl_theta": "kl_student",
    "kl_t": "kl_teacher",
    "entropy": "entropy",
    "clamped": "clamped",
    "log_p_theta": "log_p_student",
    "log_p_t": "log_p_teacher",
    "log_q": "log_q",
    "fallback": "fallback",
}
"""Names in `SamplingOutput.diagnostics`, and what they are called in a TokenTrace."""


class _Unless(str):
    """A default that can be told from the same text given by a caller."""

    __slots__ = ()


_CUDA_IF_THERE = _Unless("cuda")


class PerToken(Tensor):
    """A float tensor over tokens whose padding is NaN.

    `mean`, `sum`, `std`, `min` and `max` *without arguments* leave the padding out and give plain numbers (NaN where
    there is no token at all). With a `dim`, and everywhere else, it is an ordinary tensor; indexing keeps the class.
    """

    def mean(self, *args: Any, **kwargs: Any) -> Any:
        """Mean over the tokens; with arguments as `torch.Tensor.mean`."""
        return super().mean(*args, **kwargs) if args or kwargs else self.tokens().mean()

    def sum(self, *args: Any, **kwargs: Any) -> Any:
        """Sum over the tokens; with arguments as `torch.Tensor.sum`."""
        return super().sum(*args, **kwargs) if args or kwargs else self.tokens().sum()

    def std(self, *args: Any, **kwargs: Any) -> Any:
        """Standard deviation over the tokens; with arguments as `torch.Tensor.std`."""
        if args or kwargs:
            return super().std(*args, **kwargs)
        tokens = self.tokens()
        return tokens.std() if len(tokens) > 1 else torch.tensor(float("nan"))

    def min(self, *args: Any, **kwargs: Any) -> Any:
        """Smallest value of a token; with arguments as `torch.Tensor.min`."""
        if args or kwargs:
            return super().min(*args, **kwargs)
        tokens = self.tokens()
        return tokens.min() if len(tokens) else torch.tensor(float("nan"))

    def max(self, *args: Any, **kwargs: Any) -> Any:
        """Largest value of a token; with arguments as `torch.Tensor.max`."""
        if args or kwargs:
            return super().max(*args, **kwargs)
        tokens = self.tokens()
        return tokens.max() if len(tokens) else torch.tensor(float("nan"))

    def tokens(self) -> Float[Tensor, " tokens"]:
        """The values without the padding, as an ordinary tensor."""
        plain = self.as_subclass(Tensor)
        return plain[~plain.isnan()]

    def __format__(self, spec: str) -> str:
        value: object = self.item() if self.dim() == 0 else self.as_subclass(Tensor)
        return format(value, spec)


@dataclass
class SamplingOutput:
    """What `OptimalSamplingModel.generate` gives back. Row i belongs to prompt i; all tensors are on the CPU.

    Rows are as long as the longest completion. Ids are padded with the vocabulary's pad id and everything else with
    NaN; `diagnostics["num_tokens"]` and `finish_reasons` tell what is padding.
    """

    generated_texts: list[str] | None
    """The completions without end and special tokens; None with `skip_decode`."""
    generated_ids: Int[Tensor, "batch seq"]
    """Ids of the completions, the end token included."""
    alpha_values: PerToken
    """[batch, seq]: the teacher's weight at each token."""
    ess_ratios: PerToken
    """[batch, seq]: effective sample size to the teacher over that to the student; above 1 where q is nearer to it."""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    """[batch, seq] each: kl_theta, kl_t, entropy, clamped, log_p_theta, log_p_t, log_q, fallback. Floats: alpha_mean,
    ess_ratio_mean, kl_theta_mean, kl_t_mean, entropy_mean, clamped_share. `num_tokens`: a list. Empty without
    `return_diagnostics`."""
    logits: dict[str, Float[Tensor, "batch seq vocab"]] | None = None
    """Raw scores of both models, `theta` and `t`, where asked for."""
    q_star_probs: Float[Tensor, "batch seq vocab"] | None = None
    """The distribution each token was drawn from, where asked for."""
    finish_reasons: list[str] = field(default_factory=list)
    """`stop`, `length` or `error`."""
    errors: list[str] = field(default_factory=list)
    """Why a prompt failed, "" where it did not. The row of a failed prompt is empty."""


class OptimalSamplingModel:
    """Two models loaded once; every token drawn from p_theta^(1-alpha) * p_t^alpha.

    `model_t_path=None` means the same weights in both roles (self-distillation), loaded once. `alpha_min` and
    `alpha_max` clamp what `alpha_method` chooses. `target_top_k` / `target_top_p` restrict both models to the teacher's
    likeliest tokens, and do so only with `constraint_to_target=True`.

    `device` is the GPU where there is one, else the CPU, with a warning; a device that you name has to be there. On a
    CPU, `dtype=torch.float16` is taken as float32.

    Keyword arguments: `load_in_4bit` and `bnb_4bit_*`, `quantization_config`, `trust_remote_code`; `batch_size`,
    `kv_memory_gib`, `prefill_chunk`, `batch_invariant` (see LocalOptions); `trust_region`, `schedule_*` (see
    MixtureConfig); and defaults for `generate`: `student_system_prompt` (or `theta_system_prompt`),
    `teacher_system_prompt`, `enable_chat_template`, `thinking`.

    Raises ConfigError (an option), ModelError, TokenizerMismatchError, MissingDependencyError.
    """

    notes: dict[str, str]
    """What to know of how the models run here: device, attention, fallbacks."""

    def __init__(
        self,
        model_theta_path: str,
        model_t_path: str | None = None,
        alpha_method: str = "kl_symmetry",
        fixed_alpha: float = 0.5,
        alpha_min: float = 0.5,
        alpha_max: float = 1.0,
        constraint_to_target: bool = False,
        target_top_k: int = -1,
        target_top_p: float = 1.0,
        device: str = _CUDA_IF_THERE,
        dtype: torch.dtype = torch.float16,
        **kwargs: Any,
    ) -> None:
        _check_options(kwargs)
        support = _teacher_support(constraint_to_target, target_top_k, target_top_p)
        self._mixture = MixtureConfig(
            alpha_method=cast(AlphaMethod, alpha_method),
            fixed_alpha=fixed_alpha,
            alpha_min=alpha_min,
            alpha_max=alpha_max,
            **support,
            **_taken(kwargs, _MIXTURE_OPTIONS),
        )
        self._prompt_defaults = _prompt_options(kwargs)
        _prompt_config(self._prompt_defaults)  # contradictions are told before models are loaded
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        models = ModelConfig(
            teacher=model_theta_path if model_t_path is None else str(model_t_path),
            student=str(model_theta_path),
            dtype=cast(Any, str(self.dtype).removeprefix("torch.")),
            device=self.device,
            **_taken(kwargs, _MODEL_OPTIONS),
        )
        self.vocabulary = Vocabulary.load(models.student, models.teacher, models.trust_remote_code)
        self._closed = False
        self._told: set[str] = set()
        self._tell(self.vocabulary.notes, stacklevel=3)
        self._engine = self._open(models, LocalOptions(**_taken(kwargs, _ENGINE_OPTIONS)), kwargs)
        self.notes = self._engine.notes()
        if "auto-enabled" in self.notes.get("attention", ""):
            print(f"✅ {self.notes['attention']}")

    def _open(
        self, models: ModelConfig, options: LocalOptions, kwargs: Mapping[str, Any]
    ) -> Engine:
        from optimal_sampling.engines.local.engine import LocalEngine

        return LocalEngine.load(
            models,
            self._mixture,
            options,
            self.vocabulary,
            load_kwargs=_taken(kwargs, _LOADER_OPTIONS),
        )

    def generate(
        self,
        prompts: Sequence[str],
        prompts_t: Sequence[str] | None = None,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = -1,
        return_diagnostics: bool = True,
        skip_decode: bool = False,
        return_logits: bool = False,
        return_q_star_probs: bool = False,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        force_first_token: bool = False,
        save_logits: bool = False,
        save_q_star_probs: bool = False,
        **prompt_options: Any,
    ) -> SamplingOutput:
        """One completion per prompt, in the order of the prompts.

        `prompts_t` are the teacher's prompts where they differ. Temperature divides the logits of both models first;
        `top_p` and `top_k` truncate the mixture. `batch_size` bounds how many run at once and changes no token. A
        completion is a function of `seed`, its prompt, and how often that prompt came before in the list: the same call
        gives the same texts again, and equal prompts in one list give different ones.

        `save_logits` and `save_q_star_probs` are other names of `return_logits` and `return_q_star_probs`, which keep
        [batch, seq, vocab] floats each: mind the memory. `student_system_prompt` (or `theta_system_prompt`),
        `teacher_system_prompt`, `enable_chat_template` and `thinking` replace the constructor's.

        A prompt that fails (empty, longer than a model's context) leaves an empty row, its reason in `errors`, and a
        warning. Raises ConfigError for an option, EngineError where no prompt can go on or the model is closed.
        """
        _check_options(prompt_options, _PROMPT_OPTIONS)
        prompts = _listed("prompts", prompts)
        prompts_t = None if prompts_t is None else _listed("prompts_t", prompts_t)
        _check_prompts(prompts, prompts_t, max_new_tokens)
        if self._closed:
            raise EngineError("the model is closed; make a new OptimalSamplingModel")
        rendered = self._render(prompts, prompts_t, prompt_options)
        capture = {"log_q"} if return_q_star_probs or save_q_star_probs else set()
        capture |= set(_CAPTURED.values()) if return_logits or save_logits else set()
        settings = {
            name: getattr(self._mixture, name)
            for name in (item.name for item in fields(MixtureConfig))
        }
        settings |= {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "force_first_token": force_first_token,
        }
        options = self._engine.options
        if batch_size is not None:
            options = replace(cast(LocalOptions, options), batch_size=batch_size)
        engine = self._engine.view(
            MixtureConfig(**settings), options=options, capture=frozenset(capture)
        )
        rows = _serve(engine, _requests(rendered, seed, max_new_tokens), rendered)
        _warn_of_failures(rows)
        return self._output(rows, return_diagnostics, skip_decode, frozenset(capture))

    def close(self) -> None:
        """Free the models. Closing twice is safe; `generate` is then no longer possible."""
        self._closed = True
        self._engine.close()

    def __enter__(self) -> OptimalSamplingModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _render(
        self, prompts: Sequence[str], prompts_t: Sequence[str] | None, options: Mapping[str, Any]
    ) -> list[RenderedPrompt | str]:
        """Rendered prompts, or the reason where one cannot be rendered."""
        config = _prompt_config({**self._prompt_defaults, **_prompt_options(options)})
        renderer = PromptRenderer(config, self.vocabulary)
        self._tell(renderer.notes, stacklevel=4)
        rendered: list[RenderedPrompt | str] = []
        for student, teacher in zip(
            prompts, prompts if prompts_t is None else prompts_t, strict=True
        ):
            try:
                rendered.append(renderer.render_texts(student, teacher))
            except PromptError as error:
                rendered.append(str(error))
        return rendered

    def _tell(self, notes: Sequence[str], stacklevel: int) -> None:
        """Warn of each note once, at the line that called the constructor or `generate`."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                warnings.warn(note, stacklevel=stacklevel)

    def _output(
        self,
        rows: Sequence[_Row],
        with_diagnostics: bool,
        skip_decode: bool,
        capture: frozenset[str],
    ) -> SamplingOutput:
        completions = [row.completion for row in rows]
        alphas = _per_token([() if each is None else each.trace["alpha"] for each in completions])
        ess_ratios = _per_token(
            [() if each is None else each.trace.ess_ratio for each in completions]
        )
        logits, probabilities = None, None
        if "student_logits" in capture:
            logits = {name: self._captured(completions, key) for name, key in _CAPTURED.items()}
        if "log_q" in capture:
            probabilities = self._captured(completions, "log_q").exp_()
        return SamplingOutput(
            generated_texts=None
            if skip_decode
            else [self.vocabulary.decode(row.token_ids) for row in rows],
            generated_ids=_padded_ids([row.token_ids for row in rows], self.vocabulary.pad_id),
            alpha_values=alphas,
            ess_ratios=ess_ratios,
            diagnostics=_diagnostics(completions, alphas, ess_ratios) if with_diagnostics else {},
            logits=logits,
            q_star_probs=probabilities,
            finish_reasons=[
                "error" if each is None else each.finish_reason for each in completions
            ],
            errors=[row.error for row in rows],
        )

    def _captured(
        self, completions: Sequence[Completion | None], name: str
    ) -> Float[Tensor, "batch seq vocab"]:
        length = max((len(each.token_ids) for each in completions if each), default=0)
        result = torch.full((len(completions), length, self.vocabulary.size), float("nan"))
        for row, completion in enumerate(completions):
            if completion is not None and completion.token_ids:
                result[row, : len(completion.token_ids)] = completion.captured[name]
        return result


@dataclass(slots=True)
class _Row:
    """What became of one prompt: a completion that did not fail, or an error."""

    completion: Completion | None = None
    error: str = ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completion.token_ids if self.completion else ()


def _requests(
    rendered: Sequence[RenderedPrompt | str], seed: int, max_new_tokens: int
) -> dict[int, Request]:
    """Requests by place. The k-th occurrence of a prompt is its sample k."""
    seen: Counter[str] = Counter()
    requests = {}
    for place, prompt in enumerate(rendered):
        if isinstance(prompt, str):
            continue
        identity = prompt_id(prompt.student_text, prompt.teacher_text)
        requests[place] = Request(
            id=identity,
            sample_index=seen[identity],
            seed=seed,
            student_prompt_ids=prompt.student_ids,
            teacher_prompt_ids=prompt.teacher_ids,
            max_new_tokens=max_new_tokens,
        )
        seen[identity] += 1
    return requests


def _serve(
    engine: Engine, requests: Mapping[int, Request], rendered: Sequence[RenderedPrompt | str]
) -> list[_Row]:
    """Run the requests; completions come as they finish and are put back in order."""
    rows = [_Row(error=prompt if isinstance(prompt, str) else "") for prompt in rendered]
    places = {(request.id, request.sample_index): place for place, request in requests.items()}
    for completion in engine.generate(requests.values()):
        row = rows[places[completion.request.id, completion.request.sample_index]]
        if completion.finish_reason == "error":
            row.error = completion.error
        else:
            row.completion = completion
    return rows


def _warn_of_failures(rows: Sequence[_Row]) -> None:
    failed = [(place, row.error) for place, row in enumerate(rows) if row.error]
    if failed:
        place, error = failed[0]
        warnings.warn(
            f"{len(failed)} of {len(rows)} prompts failed; prompt {place}: {error}", stacklevel=3
        )


def _per_token(values: Sequence[Sequence[float]]) -> PerToken:
    """[batch, seq] of float32, padded with NaN."""
    result = torch.full((len(values), max(map(len, values), default=0)), float("nan"))
    for row, each in enumerate(values):
        result[row, : len(each)] = torch.tensor(each, dtype=torch.float32)
    return result.as_subclass(PerToken)


def _padded_ids(ids: Sequence[Sequence[int]], pad_id: int) -> Int[Tensor, "batch seq"]:
    result = torch.full((len(ids), max(map(len, ids), default=0)), pad_id, dtype=torch.long)
    for row, each in enumerate(ids):
        result[row, : len(each)] = torch.tensor(each, dtype=torch.long)
    return result


def _diagnostics(
    completions: Sequence[Completion | None], alphas: PerToken, ess_ratios: PerToken
) -> dict[str, Any]:
    columns: dict[str, Any] = {
        name: _per_token([() if each is None else each.trace[source] for each in completions])
        for name, source in _DIAGNOSTICS.items()
    }
    means = {
        "alpha_mean": alphas,
        "ess_ratio_mean": ess_ratios,
        "clamped_share": columns["clamped"],
    }
    means |= {f"{name}_mean": columns[name] for name in ("kl_theta", "kl_t", "entropy")}
    columns |= {name: float(column.mean()) for name, column in means.items()}
    columns["num_tokens"] = [0 if each is None else len(each.token_ids) for each in completions]
    return columns


def _check_options(given: Mapping[str, Any], known: frozenset[str] = _OPTIONS) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"; did you mean {near[0]!r}?"
                if near
                else f"; there are: {', '.join(sorted(known))}"
            )
            raise ConfigError(f"unknown option {name!r}{hint}")


def _listed(name: str, prompts: Iterable[str]) -> list[str]:
    """The prompts as a list, also from a generator. A single string is a mistake: it would be one prompt per letter."""
    given = [] if isinstance(prompts, str) else list(prompts)
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in given):
        raise ConfigError(f"{name} must be a list of strings")
    return given


def _check_prompts(prompts: list[str], prompts_t: list[str] | None, max_new_tokens: int) -> None:
    if prompts_t is not None and len(prompts_t) != len(prompts):
        raise ConfigError(
            f"there are {len(prompts)} prompts but {len(prompts_t)} prompts_t; give one of each per row"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ConfigError(
            f"max_new_tokens must be a whole number, at least 1, got {max_new_tokens}"
        )


def _taken(kwargs: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in names}


def _teacher_support(constraint_to_target: bool, top_k: int, top_p: float) -> dict[str, Any]:
    """The seeds' three options as our two."""
    given = top_k != -1 or top_p != 1.0
    if constraint_to_target and not given:
        warnings.warn(
            "constraint_to_target=True restricts nothing without target_top_k or target_top_p",
            stacklevel=3,
        )
    if not constraint_to_target and given:
        warnings.warn(
            "target_top_k and target_top_p are ignored without constraint_to_target=True",
            stacklevel=3,
        )
        return {}
    return {"teacher_support_top_k": top_k, "teacher_support_top_p": top_p}


def _prompt_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of the prompt options, the student's system prompt under one name."""
    options = {
        name: value for name, value in _taken(kwargs, _PROMPT_OPTIONS).items() if value is not None
    }
    theta = options.pop("theta_system_prompt", None)
    if theta is not None and options.setdefault("student_system_prompt", theta) != theta:
        raise ConfigError(
            "student_system_prompt and theta_system_prompt are the same option; give one of them"
        )
    return options


def _prompt_config(options: Mapping[str, Any]) -> PromptConfig:
    thinking = options.get("thinking", "default")
    if thinking not in ("on", "off", "default"):
        raise ConfigError(f"thinking must be on, off or default, got {thinking!r}")
    return PromptConfig(
        chat_template=bool(options.get("enable_chat_template")),
        thinking=cast(Thinking, thinking),
        student_system_prompt=options.get("student_system_prompt"),
        teacher_system_prompt=options.get("teacher_system_prompt"),
    )


def _device(device: str) -> str:
    """A named device has to be there; the default one is the GPU only where there is one."""
    name = str(device)
    if not name.startswith("cuda") or torch.cuda.is_available():
        return name
    if not isinstance(device, _Unless):
        raise ConfigError(
            f"device={name!r} was asked for, but PyTorch finds no CUDA GPU here; pass device='cpu'"
        )
    warnings.warn(
        "PyTorch finds no CUDA GPU here: running on the CPU, in float32 unless told otherwise",
        stacklevel=3,
    )
    return "cpu"


def _dtype(dtype: torch.dtype | str, device: str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}"
        )
    if (
        device == "cpu" and found is torch.float16
    ):  # the signature's default, and no type to compute in on a CPU
        return torch.float32
    return cast(torch.dtype, found)
