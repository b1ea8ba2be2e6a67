"""A pair of models and our options -> vLLM's engine arguments. What would be sampled wrongly is refused here.

Knows vLLM's argument names, and imports it only to ask for its platform.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from optimal_sampling.config import MixtureConfig, ModelConfig
from optimal_sampling.engines.vllm.draft import PairOverrides
from optimal_sampling.engines.vllm.options import OPTIONS
from optimal_sampling.engines.vllm.plugin import ARCHITECTURE, check_version, register
from optimal_sampling.errors import ConfigError, did_you_mean
from optimal_sampling.vocabulary import Vocabulary, resolve_model

__all__ = ["engine_arguments", "prepare_environment"]

_REFUSED = {
    "tensor_parallel_size": "parallelism over several devices (run one process per device on a slice of the data)",
    "pipeline_parallel_size": "parallelism over several devices (run one process per device on a slice of the data)",
    "data_parallel_size": "parallelism over several devices (run one process per device on a slice of the data)",
    "decode_context_parallel_size": "parallelism over several devices",
    "prefill_context_parallel_size": "parallelism over several devices",
    "quantization": "quantised models",
    "quantization_config": "quantised models",
    "enable_lora": "LoRA adapters (merge them into the model first)",
    "kv_transfer_config": "moving KV caches between servers",
    "kv_sharing_fast_prefill": "sharing KV caches between layers",
    "enable_prompt_embeds": "prompts that are embeddings",
    "enable_dbo": "splitting batches",
    "ubatch_size": "splitting batches",
    "watermark_config": "watermarks: their draws are not independent ones from q*",
    "enable_trace_replay": "tokens that are given, not drawn",
}
_OURS = {
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
_PLACE = "optimal_sampling.engines.vllm"
_CPU_KV_BYTES = 1 << 30
_OFF = (None, False, 0, 1)


def prepare_environment() -> None:
    """Make the composite model known to vLLM. Raises ConfigError where vLLM's settings cannot work."""
    check_version()
    register()
    from vllm.triton_utils import HAS_TRITON

    from vllm import envs

    if envs.VLLM_USE_V2_MODEL_RUNNER and not HAS_TRITON:
        raise ConfigError(
            "vLLM's second model runner needs Triton, which does not run here: unset VLLM_USE_V2_MODEL_RUNNER"
        )


def engine_arguments(
    models: ModelConfig,
    mixture: MixtureConfig,
    vocabulary: Vocabulary,
    draft_tokens: int = 0,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of vLLM's `EngineArgs`. `given` are the caller's own, by vLLM's names, and win.

    Raises ConfigError for what cannot work, ModelError where a model is missing.
    """
    given = dict(given or {})
    _refuse(given, models)
    teacher, student = resolve_model(models.teacher), resolve_model(models.student)
    arguments: dict[str, Any] = {
        "model": teacher,
        "trust_remote_code": models.trust_remote_code,
        "dtype": _dtype(models.dtype),
        "worker_cls": f"{_PLACE}.worker.OptimalSamplingWorker",
        "scheduler_cls": f"{_PLACE}.scheduler.OptimalSamplingScheduler",
        "async_scheduling": False,
        "logprobs_mode": "processed_logprobs",
        "hf_overrides": _overrides(models, teacher, student, mixture, vocabulary),
        "disable_log_stats": True,
    }
    contexts = [each for each in (vocabulary.student_context, vocabulary.teacher_context) if each]
    if contexts:
        arguments["max_model_len"] = min(contexts)
    if (
        _on_cpu()
    ):  # a share of the system's memory is no budget, and compiling takes longer than it gives back
        given.pop("gpu_memory_utilization", None)
        arguments |= {"kv_cache_memory_bytes": _CPU_KV_BYTES, "enforce_eager": True}
    if draft_tokens:
        arguments["speculative_config"] = _speculation(student, draft_tokens)
        if vocabulary.student_rows != vocabulary.teacher_rows:
            rows = (
                vocabulary.teacher_rows or vocabulary.size,
                vocabulary.student_rows or vocabulary.size,
            )
            arguments["hf_overrides"] = PairOverrides(arguments["hf_overrides"], *rows)
    if contexts and (given.get("max_model_len") or 0) > min(contexts):
        raise ConfigError(
            f"max_model_len={given['max_model_len']} is longer than a model's context of {min(contexts)}"
        )
    return {**arguments, **given}


def _overrides(
    models: ModelConfig, teacher: str, student: str, mixture: MixtureConfig, vocabulary: Vocabulary
) -> dict[str, Any]:
    """The composite model's config on top of the teacher's."""
    configs = {"teacher": _hf_config(teacher, models), "student": _hf_config(student, models)}
    for role, config in configs.items():
        if getattr(config, "quantization_config", None):
            raise ConfigError(f"the {role} is quantised, which the vLLM engine does not support")
        if not getattr(config, "architectures", None):
            raise ConfigError(
                f"the config of the {role} names no architecture, so vLLM cannot load it"
            )
        if config.get_text_config() is not config:
            raise ConfigError(
                f"the {role} is more than a text model, which the vLLM engine does not support"
            )
    settings = {
        "teacher_architectures": list(configs["teacher"].architectures),
        "student": student,
        "vocab_size": vocabulary.size,
        "mixture": asdict(mixture) | {"temperature": 1.0, "top_k": -1, "top_p": 1.0},
        "shared": os.path.realpath(teacher) == os.path.realpath(student),
        "end_id": min(vocabulary.stop_ids, default=0),
        "trust_remote_code": models.trust_remote_code,
    }
    return {"architectures": [ARCHITECTURE], OPTIONS: settings}


def _hf_config(folder: str, models: ModelConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=models.trust_remote_code)


def _speculation(student: str, draft_tokens: int) -> dict[str, Any]:
    """The student as draft model, its drafts drawn from its whole distribution: then acceptance loses nothing."""
    if draft_tokens < 0:
        raise ConfigError(f"draft_tokens must be at least 0, got {draft_tokens}")
    return {
        "method": "draft_model",
        "model": student,
        "num_speculative_tokens": draft_tokens,
        "draft_sample_method": "probabilistic",
    }


def _refuse(given: Mapping[str, Any], models: ModelConfig) -> None:
    known = _vllm_names()
    for name, value in given.items():
        if name in _OURS:
            raise ConfigError(
                f"{name} is set by the vLLM engine itself; instead of it there is {_OURS[name]}"
            )
        if name in _REFUSED and (value is True or value not in _OFF):
            raise ConfigError(
                f"{name}={value!r}: the vLLM engine does not support {_REFUSED[name]}"
            )
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"unknown option {name!r}, and vLLM has no such argument{hint}")
    if models.load_in_4bit:
        raise ConfigError("load_in_4bit: the vLLM engine does not support quantised models")
    if models.device.startswith("cuda:"):
        raise ConfigError(
            f"device={models.device!r}: vLLM takes the first visible GPU; set CUDA_VISIBLE_DEVICES instead"
        )


def _vllm_names() -> frozenset[str]:
    from vllm.engine.arg_utils import EngineArgs

    return frozenset(item.name for item in fields(EngineArgs))


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _dtype(name: str) -> str:
    return name if name != "auto" else "float32" if _on_cpu() else "bfloat16"
