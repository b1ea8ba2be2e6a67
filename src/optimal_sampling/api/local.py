"""`OptimalSamplingModel`: lists of prompts in, tensors out, by the local engine.

In names of arguments and outputs, `theta` is the student and `t` the teacher.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.api.batch import (
    MIXTURE_OPTIONS,
    BatchSampler,
    prompt_lists,
    taken,
    whole_number,
)
from optimal_sampling.api.notebook import ShownRow, rows_html, token_reader
from optimal_sampling.config import (
    FleetConfig,
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    PromptConfig,
)
from optimal_sampling.engines import Engine
from optimal_sampling.engines.bytes.engine import ByteEngine
from optimal_sampling.engines.fleet import open_fleet
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.errors import ConfigError, did_you_mean
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.spans import TokenReader
from optimal_sampling.types import AlphaMethod, Completion, weighted_mean

__all__ = ["OptimalSamplingModel", "PerToken", "SamplingOutput"]

_ENGINE_OPTIONS = frozenset(item.name for item in fields(LocalOptions))
_MODEL_OPTIONS = frozenset(
    {"allow_unused_weights", "granularity", "load_in_4bit", "trust_remote_code"}
)
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
_FLEET_OPTIONS = frozenset(item.name for item in fields(FleetConfig))
_OPTIONS = (
    _ENGINE_OPTIONS
    | MIXTURE_OPTIONS
    | _MODEL_OPTIONS
    | _PROMPT_OPTIONS
    | _LOADER_OPTIONS
    | _FLEET_OPTIONS
)

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
    "curvature": "curvature",
    "vetoed": "vetoed",
}
"""Names in `SamplingOutput.diagnostics`, and what they are called in a TokenTrace."""


_COLOURED = {"kl_student": "kl_theta", "kl_teacher": "kl_t", "vetoed": "vetoed"}
"""Metrics of coloured text, and their names in `SamplingOutput.diagnostics`."""


class _DefaultDevice(str):
    """The default device, which differs in type from the same text given by a caller."""

    __slots__ = ()


@dataclass
class SamplingOutput:
    """Result of `OptimalSamplingModel.generate`. Row i belongs to prompt i; tensors are on the CPU.

    Rows are as long as the longest completion. Ids are padded with the vocabulary's pad id and
    everything else with NaN; `diagnostics["num_tokens"]` and `finish_reasons` tell what is padding.
    """

    generated_texts: list[str] | None
    """The completions without end and special tokens; None with `skip_decode`."""
    generated_ids: Int[Tensor, "batch seq"]
    """Ids of the completions, the end token included."""
    alpha_values: PerToken
    """[batch, seq]: the teacher's weight at each token."""
    ess_ratios: PerToken
    """[batch, seq]: ess_teacher / ess_student; above 1 where q is closer to the teacher."""
    diagnostics: dict[str, Any] = field(default_factory=dict)
    """[batch, seq] each: kl_theta, kl_t, entropy, clamped, log_p_theta, log_p_t, log_q, fallback,
    curvature (Var_q of the models' log ratio), vetoed (the student's mass outside of the support).
    Floats: alpha_mean, alpha_weighted_mean (alpha where the models differ: each token with its
    curvature as weight), ess_ratio_mean (ratio of the two mean ESS), kl_theta_mean, kl_t_mean,
    entropy_mean, clamped_share. `num_tokens`: a list. Empty without `return_diagnostics`."""
    logits: dict[str, Float[Tensor, "batch seq vocab"]] | None = None
    """Raw scores of both models, `theta` and `t`, where asked for."""
    q_star_probs: Float[Tensor, "batch seq vocab"] | None = None
    """The distribution each token was drawn from, where asked for."""
    finish_reasons: list[str] = field(default_factory=list)
    """`stop`, `length` or `error`."""
    errors: list[str] = field(default_factory=list)
    """Why a prompt failed, "" where it did not. The row of a failed prompt is empty."""
    _reader: TokenReader | None = field(default=None, repr=False, compare=False)
    """The texts of the tokens, for notebooks. A pickled output has none."""
    _lengths: list[int] = field(default_factory=list, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_reader": None}

    def _repr_html_(self) -> str:
        rows = map(self._row, range(len(self._lengths)))
        return rows_html(self._reader, len(self._lengths), rows)

    def _row(self, row: int) -> ShownRow:
        """A completion without padding. Without diagnostics its tokens have their alpha alone."""
        length = self._lengths[row]
        columns = {name: self.diagnostics.get(own) for name, own in _COLOURED.items()}
        columns["alpha"] = self.alpha_values
        return ShownRow(
            f"prompt {row}: {self.errors[row] or self.finish_reasons[row]}",
            self.generated_ids[row, :length].tolist(),
            {
                name: column[row, :length].tolist()
                for name, column in columns.items()
                if column is not None
            },
            ends=self.finish_reasons[row] == "stop" and length > 0,
        )


class OptimalSamplingModel(BatchSampler):
    """Two models loaded once; every token drawn from p_theta^(1-alpha) * p_t^alpha.

    The student comes first: `model_theta_path` and `prompts` are the student's, `model_t_path` and
    `prompts_t` the teacher's. `OptimalSamplingV1` has the opposite order, the teacher first.

    `model_t_path=None` means the same weights in both roles (self-distillation), loaded once.
    `alpha_min` and `alpha_max` clamp what `alpha_method` chooses. `target_top_k` / `target_top_p`
    restrict both models to the teacher's likeliest tokens, and do so only with
    `constraint_to_target=True`.

    `device` is the GPU where there is one, else the CPU, with a warning; a device that you name has
    to be there. On a CPU, `dtype=torch.float16` is taken as float32.

    Keyword arguments: `load_in_4bit` and `bnb_4bit_*`, `quantization_config`, `trust_remote_code`,
    `allow_unused_weights`, `granularity`;
    the fields of LocalOptions; those of FleetConfig, such as `workers=2`, for engines in processes
    of their own that share the prompts; `trust_region`, `schedule_*`, `veto_min_p`,
    `interleaved_*`, `arithmetic_weight` and `teacher_support_min_p` of MixtureConfig; and defaults
    for `generate`: `student_system_prompt` (or `theta_system_prompt`), `teacher_system_prompt`,
    `enable_chat_template`, `thinking`.

    Raises ConfigError (an option), ModelError, TokenizerMismatchError, MissingDependencyError.
    """

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
        device: str = _DefaultDevice("cuda"),
        dtype: torch.dtype = torch.float16,
        **kwargs: Any,
    ) -> None:
        _check_options(kwargs, _OPTIONS, OptimalSamplingModel)
        support = _teacher_support(constraint_to_target, target_top_k, target_top_p)
        self._mixture = MixtureConfig(
            alpha_method=cast(AlphaMethod, alpha_method),
            fixed_alpha=fixed_alpha,
            alpha_min=alpha_min,
            alpha_max=alpha_max,
            **support,
            **taken(kwargs, MIXTURE_OPTIONS),
        )
        fleet = _fleet(kwargs)
        self._prompt_defaults = _prompt_options(kwargs)
        _prompt_config(self._prompt_defaults)  # checked before models are loaded
        self.device = _device(device)
        self.dtype = _dtype(dtype, self.device)
        models = ModelConfig(
            teacher=model_theta_path if model_t_path is None else str(model_t_path),
            student=str(model_theta_path),
            dtype=cast(Any, str(self.dtype).removeprefix("torch.")),
            device=self.device,
            **taken(kwargs, _MODEL_OPTIONS),
        )
        super().__init__(models)
        options = LocalOptions(**taken(kwargs, _ENGINE_OPTIONS))
        self._engine = self._open(models, options, fleet, taken(kwargs, _LOADER_OPTIONS))
        self.notes = self._engine.notes()
        if "auto-enabled" in self.notes.get("attention", ""):
            print(f"✅ {self.notes['attention']}")

    def _open(
        self,
        models: ModelConfig,
        options: LocalOptions,
        fleet: FleetConfig,
        load_kwargs: dict[str, Any],
    ) -> Engine:
        """The engine, or several in processes of their own."""
        if not fleet.is_used:
            engine_class = ByteEngine if self.vocabulary.granularity == "byte" else LocalEngine
            return engine_class.load(
                models, self._mixture, options, self.vocabulary, load_kwargs=load_kwargs
            )
        return open_fleet(
            options,
            models,
            self._mixture,
            self.vocabulary,
            fleet=fleet,
            report=lambda line: warnings.warn(line, stacklevel=2),
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

        `prompts_t` are the teacher's prompts where they differ. Temperature divides the logits of
        both models first; `top_p` and `top_k` truncate the mixture. `batch_size` bounds how many
        run at once and changes no token. A completion is a function of `seed`, its prompt, and how
        often that prompt came before in the list: the same call gives the same texts again, and
        equal prompts in one list give different ones.

        `save_logits` and `save_q_star_probs` are other names of `return_logits` and
        `return_q_star_probs`, which keep [batch, seq, vocab] floats each: mind the memory.
        `student_system_prompt` (or `theta_system_prompt`), `teacher_system_prompt`,
        `enable_chat_template` and `thinking` replace the constructor's.

        A prompt that fails (empty, longer than a model's context) leaves an empty row, its reason
        in `errors`, and a warning. Raises ConfigError for an option, EngineError where no prompt
        can go on or the model is closed.
        """
        _check_options(prompt_options, _PROMPT_OPTIONS, OptimalSamplingModel.generate)
        student, teacher = prompt_lists(prompts, prompts_t, "prompts_t")
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        seed = whole_number("seed", seed)
        self._check_open()
        config = _prompt_config({**self._prompt_defaults, **_prompt_options(prompt_options)})
        renderer = PromptRenderer(config, self.vocabulary)
        self._warn_once(renderer.notes, stacklevel=3)
        capture = _capture(return_logits or save_logits, return_q_star_probs or save_q_star_probs)
        mixture = self._mixture_of_call(temperature, top_p, top_k, force_first_token)
        options = cast(LocalOptions, self._engine.options)
        if batch_size is not None:
            options = replace(options, batch_size=batch_size)
        engine = self._engine.view(mixture, options=options, capture=capture)
        pairs = zip(student, teacher, strict=True)
        rows = self._sample(engine, renderer, pairs, seed, max_new_tokens)
        return self._output(rows, return_diagnostics, skip_decode, capture)

    def _output(
        self,
        rows: Sequence[Completion],
        with_diagnostics: bool,
        skip_decode: bool,
        capture: frozenset[str],
    ) -> SamplingOutput:
        logits, probabilities = None, None
        if "student_logits" in capture:
            logits = {name: self._captured(rows, key) for name, key in _CAPTURED.items()}
        if "log_q" in capture:
            probabilities = self._captured(rows, "log_q").exp_()
        texts = None if skip_decode else [self._text(row) for row in rows]
        return SamplingOutput(
            generated_texts=texts,
            generated_ids=_padded_ids([row.token_ids for row in rows], self.vocabulary.pad_id),
            alpha_values=_per_token([row.trace["alpha"] for row in rows]),
            ess_ratios=_per_token([row.trace.ess_ratio for row in rows]),
            diagnostics=_diagnostics(rows) if with_diagnostics else {},
            logits=logits,
            q_star_probs=probabilities,
            finish_reasons=[row.finish_reason for row in rows],
            errors=[row.error for row in rows],
            _reader=token_reader(self.vocabulary),
            _lengths=[len(row.token_ids) for row in rows],
        )

    def _captured(self, rows: Sequence[Completion], name: str) -> Float[Tensor, "batch seq vocab"]:
        length = max((len(row.token_ids) for row in rows), default=0)
        result = torch.full((len(rows), length, self.vocabulary.size), float("nan"))
        for place, row in enumerate(rows):
            if row.token_ids:
                result[place, : len(row.token_ids)] = row.captured[name]
        return result


def _fleet(kwargs: Mapping[str, Any]) -> FleetConfig:
    """The workers that are asked for. Raises ConfigError for options that cannot reach them."""
    fleet = FleetConfig(**taken(kwargs, _FLEET_OPTIONS))
    for name in _LOADER_OPTIONS & kwargs.keys() if fleet.is_used else ():
        raise ConfigError(
            f"{name} cannot be given together with workers: workers load models with the options "
            "of ModelConfig alone, such as load_in_4bit"
        )
    return fleet


def _capture(logits: bool, q_star_probs: bool) -> frozenset[str]:
    names = _CAPTURED.values() if logits else ()
    return frozenset({*names, "log_q"} if q_star_probs else names)


def _diagnostics(rows: Sequence[Completion]) -> dict[str, Any]:
    def column(source: str) -> PerToken:
        return _per_token([row.trace[source] for row in rows])

    columns: dict[str, Any] = {name: column(source) for name, source in _DIAGNOSTICS.items()}
    alphas = column("alpha")
    means = {f"{name}_mean": columns[name] for name in ("kl_theta", "kl_t", "entropy")}
    means |= {"alpha_mean": alphas, "clamped_share": columns["clamped"]}
    result = columns | {name: float(values.mean()) for name, values in means.items()}
    weights = columns["curvature"].flatten().tolist()
    result["alpha_weighted_mean"] = weighted_mean(alphas.flatten().tolist(), weights)
    result["ess_ratio_mean"] = float(column("ess_teacher").mean() / column("ess_student").mean())
    result["num_tokens"] = [len(row.token_ids) for row in rows]
    return result


def _check_options(
    given: Mapping[str, Any], known: frozenset[str], function: Callable[..., Any]
) -> None:
    """Raise ConfigError for a keyword argument that is not known.

    The message names the parameters of the function too.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        parameters = inspect.signature(function).parameters.values()
        named = {each.name for each in parameters if each.kind != each.VAR_KEYWORD} - {"self"}
        options = sorted(known | named)
        hint = did_you_mean(unknown[0], options) or f"; there are: {', '.join(options)}"
        raise ConfigError(f"unknown option {unknown[0]!r}{hint}")


def _teacher_support(constraint_to_target: bool, top_k: int, top_p: float) -> dict[str, Any]:
    """The options of MixtureConfig; warns where the three do not fit together."""
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
        name: value for name, value in taken(kwargs, _PROMPT_OPTIONS).items() if value is not None
    }
    theta = options.pop("theta_system_prompt", None)
    if theta is not None and options.setdefault("student_system_prompt", theta) != theta:
        raise ConfigError(
            "student_system_prompt and theta_system_prompt are the same option; give one of them"
        )
    return options


def _prompt_config(options: Mapping[str, Any]) -> PromptConfig:
    chat_template = bool(options.get("enable_chat_template"))
    own = {name: value for name, value in options.items() if name != "enable_chat_template"}
    return PromptConfig(chat_template=chat_template, **own)


def _device(device: str) -> str:
    """A named device has to be there; the default one is the GPU only where there is one."""
    name = str(device)
    if not name.startswith("cuda") or torch.cuda.is_available():
        return name
    if not isinstance(device, _DefaultDevice):
        raise ConfigError(
            f"device={name!r} was asked for, but PyTorch finds no CUDA GPU here; pass device='cpu'"
        )
    warnings.warn(
        "PyTorch finds no CUDA GPU here: running on the CPU, "
        "in float32 unless another dtype is given",
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


def _over_tokens(name: str, least: int) -> Callable[..., Any]:
    """The method `name` of tensors, which without arguments leaves the padding out.

    It is NaN for fewer than `least` tokens.
    """

    def reduce(self: PerToken, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return getattr(super(PerToken, self), name)(*args, **kwargs)
        tokens = self.tokens()
        return getattr(tokens, name)() if len(tokens) >= least else torch.tensor(torch.nan)

    reduce.__name__ = name
    reduce.__doc__ = f"Over the tokens; with arguments as `torch.Tensor.{name}`."
    return reduce


class PerToken(Tensor):
    """A float tensor over tokens whose padding is NaN.

    `mean`, `sum`, `std`, `min` and `max` *without arguments* leave the padding out and give plain
    numbers (NaN where there is no token at all; 0 for `sum`). With a `dim`, and everywhere else, it
    is an ordinary tensor; indexing keeps the class.
    """

    mean: Any = _over_tokens("mean", least=1)
    sum: Any = _over_tokens("sum", least=0)
    std: Any = _over_tokens("std", least=2)
    min: Any = _over_tokens("min", least=1)
    max: Any = _over_tokens("max", least=1)

    def tokens(self) -> Float[Tensor, " tokens"]:
        """The values without the padding, as an ordinary tensor."""
        plain = self.as_subclass(Tensor)
        return plain[~plain.isnan()]

    def __format__(self, spec: str) -> str:
        value: object = self.item() if self.dim() == 0 else self.as_subclass(Tensor)
        return format(value, spec)


def _per_token(values: Sequence[Sequence[float]]) -> PerToken:
    """[batch, seq] of float32, padded with NaN."""
    return _padded(values, torch.nan, torch.float32).as_subclass(PerToken)


def _padded_ids(ids: Sequence[Sequence[int]], pad_id: int) -> Int[Tensor, "batch seq"]:
    """Token ids as one tensor."""
    return _padded(ids, pad_id, torch.long)


def _padded(rows: Sequence[Sequence[float]], padding: float, dtype: torch.dtype) -> Tensor:
    result = torch.full((len(rows), max(map(len, rows), default=0)), padding, dtype=dtype)
    for place, row in enumerate(rows):
        result[place, : len(row)] = torch.tensor(row, dtype=dtype)
    return result
