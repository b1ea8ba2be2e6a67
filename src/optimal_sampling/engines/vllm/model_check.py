"""Both models' logits against Transformers when the engine starts, one model at a time.

vLLM has implementations of its own, and knows of one model where there are two: what it gets wrong
shows in the logits of the last tokens of a short text, or of one longer than a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from optimal_sampling.errors import ModelError

__all__ = ["check_models"]

_SHORT, _LONG, _LONGEST = 8, 256, 8192
_ROWS = 8
_FLOAT32_LIMIT = 1e-2
_NOISES = 5
_DEQUANTISED = "compressed-tensors"
"""The quantisation of which Transformers computes what the weights stand for, on any device."""
_INT8_PER_TOKEN = ("int", 8, "token", True)
_LARGEST = {"cpu": 2_000_000_000, "gpu": 8_000_000_000}
"""Parameters from which on a model is not compared unasked."""


@dataclass(frozen=True)
class _Run:
    """vLLM's log-probabilities, [rows, vocab], at the last tokens of a text."""

    ids: Int[Tensor, " tokens"]
    whole: Tensor
    """Of the text in one piece."""
    parts: Tensor
    """Of the text in several."""


def check_models(runner: Any, wanted: str) -> dict[str, str]:
    """What was found, by role. `wanted`: `on`, or `auto` for models that are small enough.

    Every device of a split model runs its part, and the first one compares.

    Raises ModelError where a model's log-probabilities are off by more than 1e-2 in float32, or by
    more than five times its own noise in lower precision: what changes with the shape of a batch,
    and by rounding to that precision in Transformers. Quantised weights are dequantised there,
    activations rounded as in vLLM; the precision of their noise is at most bfloat16.
    """
    model = runner.get_model()
    roles = ["teacher"] if model.settings.shared else ["teacher", "student"]
    found = {}
    for role in roles:
        reason = _reason_against(runner, role, wanted)
        if reason:
            found[role] = f"not compared: {reason}"
            continue
        runs = _run(runner, role)
        if runner.vllm_config.parallel_config.rank == 0:
            found[role] = _compare(role, model.role_configs[role], runs)
    return found


def _reason_against(runner: Any, role: str, wanted: str) -> str:
    model = runner.get_model()
    scheme = model.role_configs[role].quantization
    if scheme not in (None, _DEQUANTISED):
        return f"its weights are quantised ({scheme})"
    count = sum(parameter.numel() for parameter in getattr(model, role).parameters())
    count *= runner.vllm_config.parallel_config.tensor_parallel_size
    limit = _LARGEST["cpu" if runner.device.type == "cpu" else "gpu"]
    if wanted == "auto" and count > limit:
        return f"more than {limit / 1e9:.0f}e9 parameters; --check-models on does it"
    return ""


@torch.inference_mode()
def _run(runner: Any, role: str) -> list[_Run]:
    """vLLM's log-probabilities of a short and a long text, each as a whole and in three pieces."""
    model = runner.get_model()
    size = model.settings.vocab_size
    runs = []
    for length in _lengths(runner, model.role_configs[role]):
        ids = _text(length, size)
        logits = [runner.role_logits(role, ids, piece) for piece in (length, length // 3 + 1)]
        runs.append(_Run(ids, *(_log_p(each, size) for each in logits)))
    return runs


@torch.inference_mode()
def _compare(role: str, config: Any, runs: list[_Run]) -> str:
    reference = _load(role, config)
    precise_limit = _FLOAT32_LIMIT if _is_precise(config) else 0.0
    lower = torch.bfloat16 if config.dtype == torch.float32 else config.dtype

    def log_p(run: _Run) -> Tensor:
        logits = reference(input_ids=run.ids[None], use_cache=False).logits[0]
        return _log_p(logits, run.whole.shape[-1])

    precise = rounded = [log_p(run) for run in runs]
    if not precise_limit:
        reference.to(lower)
        rounded = [log_p(run) for run in runs]
    reports = []
    for run, exact, coarse in zip(runs, precise, rounded, strict=True):
        if not (exact.isfinite().all() and run.whole.isfinite().all()):
            return "not compared: logits that are not finite"
        noise = max(_distance(run.whole, run.parts), _distance(exact, coarse))
        limit = precise_limit or _NOISES * noise
        error = max(_distance(run.whole, exact), _distance(run.parts, exact))
        length = len(run.ids)
        if error > limit:
            raise ModelError(
                f"vLLM computes another {role} than Transformers: log-probabilities of a text of "
                f"{length} tokens are off by up to {error:.2g} nats (allowed: {limit:.2g}). Use "
                "--engine local, or --check-models off where you know that vLLM is right"
            )
        reports.append(f"{error:.1e} nats on {length} tokens (allowed: {limit:.1e})")
    return ", ".join(reports)


def _is_precise(config: Any) -> bool:
    """Whether the model computes in float32, with nothing rounded to fewer bits."""
    return config.dtype == torch.float32 and config.quantization is None


def _load(role: str, config: Any) -> Any:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantised = config.quantization is not None
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if quantised else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=torch.float32,
            device_map=None,
            attn_implementation="eager",
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **extra,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"the {role} could not be loaded by Transformers, to compare vLLM with: {first} "
            "(--check-models off leaves this out)"
        ) from error
    _round_activations(model)
    return model.eval()


def _round_activations(model: nn.Module) -> None:
    """Round the inputs of layers with 8-bit integers as vLLM does, not as compressed-tensors.

    vLLM's kernels use 255 of the 256 integers, so that 0 is in their middle. Other schemes are left
    to compressed-tensors.
    """
    for layer in model.modules():
        scheme = getattr(layer, "quantization_scheme", None)
        inputs = getattr(scheme, "input_activations", None)
        if inputs is None:
            continue
        if (inputs.type, inputs.num_bits, inputs.strategy, inputs.symmetric) == _INT8_PER_TOKEN:
            vars(layer)["quantization_enabled"] = False  # its own rounding
            layer.register_forward_pre_hook(_round_input)


def _round_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first, *rest = inputs
    scales = first.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return (first / scales).round() * scales, *rest


def _lengths(runner: Any, config: Any) -> list[int]:
    """A short text and a long one: beyond a window where that is affordable and fits."""
    window = getattr(config.hf_text_config, "sliding_window", None) or 0
    wanted = window + 64 if 0 < window + 64 <= _LONGEST else 0
    longest = min(max(_LONG, wanted), config.max_model_len, runner.most_tokens())
    return [min(_SHORT, longest), longest]


def _text(length: int, vocab_size: int) -> Int[Tensor, " tokens"]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(vocab_size, (length,), generator=generator)


def _log_p(logits: Float[Tensor, "tokens vocab"], vocab_size: int) -> Float[Tensor, "rows vocab"]:
    return logits[-_ROWS:, :vocab_size].double().cpu().log_softmax(-1)


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest difference of log-probabilities, where one of them is above e^-20."""
    seen = torch.maximum(one, other) > -20
    return float((one - other).abs()[seen].max())
