"""A pair of models and this package's options -> vLLM's engine arguments.

Arguments with which vLLM would draw from another distribution are refused. vLLM is imported to ask
for its platform and the names of its arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from optimal_sampling.config import MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.engines.vllm.plugin import ARCHITECTURE, check_version, register
from optimal_sampling.engines.vllm.request_options import OPTIONS
from optimal_sampling.engines.vllm.tensor_parallel import can_split
from optimal_sampling.errors import ConfigError, ModelError, did_you_mean
from optimal_sampling.vocabulary import Vocabulary, resolve_model
from optimal_sampling.vocabulary.model_folder import check_weight_files, has_adapter

__all__ = ["engine_arguments", "prepare_environment"]

_ONE_DEVICE = (
    "this kind of parallelism: split the models (tensor_parallel_size), or run one process per "
    "device on a slice of the data"
)
_REFUSED = {
    "pipeline_parallel_size": _ONE_DEVICE,
    "data_parallel_size": _ONE_DEVICE,
    "decode_context_parallel_size": _ONE_DEVICE,
    "prefill_context_parallel_size": _ONE_DEVICE,
    "quantization_config": "quantising while it loads: give a quantised model",
    "enable_lora": "LoRA adapters (merge them into the model first)",
    "kv_transfer_config": "moving KV caches between servers",
    "kv_sharing_fast_prefill": "sharing KV caches between layers",
    "enable_prompt_embeds": "prompts that are embeddings",
    "enable_dbo": "splitting batches",
    "ubatch_size": "splitting batches",
    "watermark_config": "watermarks: their draws are not independent ones from q*",
    "enable_trace_replay": "tokens that are given, not drawn",
}
"""vLLM's arguments that the engine does not support, and what they are for."""

_SET_BY_ENGINE = {
    "model": "model_teacher",
    "tokenizer": "model_teacher",
    "speculative_config": "draft_tokens",
    "spec_model": "draft_tokens",
    "spec_method": "draft_tokens",
    "spec_tokens": "draft_tokens",
    "hf_overrides": "the options of the mixture",
    "worker_cls": "nothing: it is the engine",
    "scheduler_cls": "nothing: it is the engine",
    "logprobs_mode": "nothing: log-probabilities are those of the distribution that is drawn from",
    "async_scheduling": "nothing: steps are not overlapped",
}
"""vLLM's arguments that the engine sets, and the option to use in their place."""

_PACKAGE = "optimal_sampling.engines.vllm"
_CPU_KV_BYTES = 1 << 30
_AUTO_DRAFTS = 5
_LARGEST_DRAFTED_BATCH = 4
_OFF = (None, False, 0, 1)
_SAFE_FORMATS = frozenset({"safetensors", "fastsafetensors", "instanttensor", "mistral", "dummy"})
"""vLLM's load formats that read safetensors alone, or nothing."""


def prepare_environment() -> None:
    """Register the model classes. Raises ConfigError for settings of vLLM that cannot work."""
    check_version()
    register()
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    if envs.VLLM_USE_V2_MODEL_RUNNER and not HAS_TRITON:
        raise ConfigError(
            "vLLM's second model runner needs Triton, which does not run here: unset "
            "VLLM_USE_V2_MODEL_RUNNER"
        )


def engine_arguments(
    models: ModelConfig,
    mixture: MixtureConfig,
    options: VllmOptions,
    vocabulary: Vocabulary,
    given: Mapping[str, Any],
    full_batches: bool = True,
) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`. `given` are the caller's own, by vLLM's names, and win.

    `full_batches`: whether most steps have as many requests as the options allow.

    Raises ConfigError for what cannot work, ModelError where a model is missing.
    """
    _check_given(given)
    _check_models(models)
    random = given.get("load_format") == "dummy"
    teacher, student = _folders(models, weights=not random)
    _check_quantization(given.get("quantization"), _config(teacher, models))
    problem = _draft_problem(_config(student, models), given.get("tensor_parallel_size", 1))
    automatic = options.draft_tokens == "auto"
    if automatic:
        drafts = _drafts_that_pay(options, full_batches)
        options = replace(options, draft_tokens=0 if problem or student == teacher else drafts)
    arguments: dict[str, Any] = {
        "model": teacher,
        "trust_remote_code": models.trust_remote_code,
        "dtype": _dtype(models.dtype),
        "worker_cls": f"{_PACKAGE}.worker.OptimalSamplingWorker",
        "scheduler_cls": f"{_PACKAGE}.pair_scheduler.OptimalSamplingScheduler",
        "async_scheduling": False,
        "logprobs_mode": "processed_logprobs",
        "hf_overrides": {
            "architectures": [ARCHITECTURE],
            OPTIONS: {
                **_pair_settings(models, teacher, student),
                "vocab_size": vocabulary.size,
                "mixture": asdict(mixture) | {"temperature": 1.0, "top_k": -1, "top_p": 1.0},
                "end_id": min(vocabulary.stop_ids, default=0),
                "check_models": "off" if random else options.check_models,
            },
        },
        "load_format": "safetensors",  # pickled weights run code
        "disable_log_stats": True,
        "max_num_seqs": options.batch_size,
        "max_num_batched_tokens": options.tokens_per_step,
    }
    arguments |= _context_argument(vocabulary, given)
    if options.drafts_per_step:
        if problem:
            raise ConfigError(f"draft_tokens: {problem}")
        arguments["speculative_config"] = _speculation(student, options, automatic)
        arguments["hf_overrides"] = _overrides_with_draft(arguments["hf_overrides"], vocabulary)
    if _on_cpu():
        # A share of the system's memory is no budget, and compiling takes longer than it saves.
        given = {name: value for name, value in given.items() if name != "gpu_memory_utilization"}
        arguments |= {"kv_cache_memory_bytes": _CPU_KV_BYTES, "enforce_eager": True}
    if options.kv_memory_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(options.kv_memory_gib * 2**30)
    return {**arguments, **given}


def _draft_problem(student: Any, devices: int) -> str:
    """Why a student with this config of Transformers cannot draft, "" if it can."""
    if getattr(student, "quantization_config", None):
        return (
            "the student is quantised, and vLLM finds no layers of a draft model by the names that "
            "its config has; leave drafts out"
        )
    if not can_split(student, devices):
        return (
            "vLLM demands a draft model that can be split over the devices, and the student's "
            "heads cannot; leave drafts out, or take another tensor_parallel_size"
        )
    return ""


def _folders(models: ModelConfig, weights: bool) -> tuple[str, str]:
    """Folders of teacher and student. Raises ModelError, also where `weights` are needed."""
    teacher = resolve_model(models.teacher, models.teacher_revision, weights=True)
    student = resolve_model(models.student, models.student_revision, weights=True)
    for role, folder in (("teacher", teacher), ("student", student)):
        if weights:
            check_weight_files(f"the {role} model {folder!r}", Path(folder))
        if has_adapter(folder):
            raise ModelError(
                f"a LoRA adapter lies beside the {role} model {folder!r}, which the vLLM "
                "engine does not apply: merge it into the model, or move adapter_config.json away"
            )
    return teacher, student


def _context_argument(vocabulary: Vocabulary, given: Mapping[str, Any]) -> dict[str, int]:
    """`max_model_len`: the shorter context. Raises ConfigError where the caller's is longer."""
    known = (vocabulary.student_context, vocabulary.teacher_context)
    contexts = [each for each in known if each]
    if not contexts:
        return {}
    shorter = min(contexts)
    wanted = given.get("max_model_len") or 0
    if wanted > shorter:
        raise ConfigError(f"max_model_len={wanted} is longer than a model's context of {shorter}")
    return {"max_model_len": shorter}


def _pair_settings(models: ModelConfig, teacher: str, student: str) -> dict[str, Any]:
    """Settings of the composite model that follow from the two folders."""
    _architectures("student", student, models)
    return {
        "teacher_architectures": _architectures("teacher", teacher, models),
        "student": student,
        "shared": os.path.realpath(teacher) == os.path.realpath(student),
        "trust_remote_code": models.trust_remote_code,
    }


def _architectures(role: str, folder: str, models: ModelConfig) -> list[str]:
    """Architectures of a model. Raises ConfigError for a kind that vLLM cannot run in a pair."""
    config = _config(folder, models)
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    if quantization.get("kv_cache_scheme"):
        raise ConfigError(
            f"the {role} is made for a quantised KV cache, which both models would get; the vLLM "
            "engine does not support that"
        )
    architectures = getattr(config, "architectures", None)
    if not architectures:
        raise ConfigError(f"the config of the {role} names no architecture, so vLLM cannot load it")
    if config.get_text_config() is not config:
        raise ConfigError(
            f"the {role} is more than a text model, which the vLLM engine does not support"
        )
    return list(architectures)


def _drafts_that_pay(options: VllmOptions, full_batches: bool) -> int:
    """Drafts per step where they were measured to be faster (docs/vllm.md), 0 elsewhere."""
    from vllm import envs

    small = options.batch_size <= _LARGEST_DRAFTED_BATCH
    switched = not full_batches and not envs.VLLM_USE_V2_MODEL_RUNNER  # which drafts all the same
    return _AUTO_DRAFTS if _on_cpu() and (small or switched) else 0


def _config(folder: str, models: ModelConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=models.trust_remote_code)


def _overrides_with_draft(
    overrides: dict[str, Any], vocabulary: Vocabulary
) -> dict[str, Any] | Callable[[Any], Any]:
    """`hf_overrides` with the student as draft model."""
    if vocabulary.student_rows == vocabulary.teacher_rows:
        return overrides
    from optimal_sampling.engines.vllm.draft_model import PairOverrides  # imports torch

    teacher_rows = vocabulary.teacher_rows or vocabulary.size
    student_rows = vocabulary.student_rows or vocabulary.size
    return PairOverrides(overrides, teacher_rows, student_rows)


def _speculation(student: str, options: VllmOptions, by_batch: bool) -> dict[str, Any]:
    """`speculative_config`. Drafts are drawn from the student's whole distribution.

    vLLM's accept-reject rule then leaves the distribution that is drawn from unchanged. `by_batch`:
    no drafts in steps of more requests than they were measured to pay for.
    """
    speculation: dict[str, Any] = {
        "method": "draft_model",
        "model": student,
        "num_speculative_tokens": options.drafts_per_step,
        "draft_sample_method": "probabilistic",
    }
    if by_batch and options.batch_size > _LARGEST_DRAFTED_BATCH:
        speculation["num_speculative_tokens_per_batch_size"] = [
            (1, _LARGEST_DRAFTED_BATCH, options.drafts_per_step),
            (_LARGEST_DRAFTED_BATCH + 1, options.batch_size, 0),
        ]
    return speculation


def _check_given(given: Mapping[str, Any]) -> None:
    known = _vllm_names()
    for name, value in given.items():
        if name in _SET_BY_ENGINE:
            raise ConfigError(
                f"{name} is set by the vLLM engine itself; instead of it there is "
                f"{_SET_BY_ENGINE[name]}"
            )
        if name in _REFUSED and (value is True or value not in _OFF):
            raise ConfigError(
                f"{name}={value!r}: the vLLM engine does not support {_REFUSED[name]}"
            )
        if name == "load_format" and value not in _SAFE_FORMATS:
            raise ConfigError(
                f"load_format={value!r}: the vLLM engine reads safetensors alone; the formats are "
                f"{', '.join(sorted(_SAFE_FORMATS))}"
            )
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"unknown option {name!r}, and vLLM has no such argument{hint}")


def _check_models(models: ModelConfig) -> None:
    if models.load_in_4bit:
        raise ConfigError(
            "load_in_4bit: the vLLM engine does not quantise; give a model that is quantised"
        )
    if models.allow_unused_weights:
        raise ConfigError(
            "allow_unused_weights: vLLM loads no such model; leave it out, or use --engine local"
        )
    if models.device.startswith("cuda:"):
        raise ConfigError(
            f"device={models.device!r}: vLLM takes the first visible GPU; set "
            "CUDA_VISIBLE_DEVICES instead"
        )


def _check_quantization(name: str | None, teacher: Any) -> None:
    """Raise ConfigError where vLLM would quantise the teacher, which has this config, itself."""
    if name and not getattr(teacher, "quantization_config", None):
        raise ConfigError(
            f"quantization={name!r}: the teacher is not quantised, and vLLM would quantise it "
            "while it loads, which this engine does not support; give a quantised model"
        )


def _vllm_names() -> frozenset[str]:
    from vllm.engine.arg_utils import EngineArgs

    return frozenset(item.name for item in fields(EngineArgs))


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _dtype(name: str) -> str:
    if name != "auto":
        return name
    return "float32" if _on_cpu() else "bfloat16"
