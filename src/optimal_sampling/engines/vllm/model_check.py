"""Both models' logits against Transformers when the engine starts, one model at a time.

vLLM has implementations of its own, and knows of one model where there are two: what it gets wrong
shows in the logits of the last tokens of a short text, or of one longer than a sliding window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.errors import ModelError

__all__ = ["check_models"]

_SHORT, _LONG, _LONGEST = 8, 256, 8192
_ROWS = 8
_FLOAT32_LIMIT = 1e-2
_NOISES = 5
_LARGEST = {"cpu": 2_000_000_000, "gpu": 8_000_000_000}
"""Parameters from which on a model is not compared unasked."""


@dataclass(frozen=True)
class _Reference:
    """A model's log-probabilities by Transformers, on a CPU."""

    model: Any
    vocab_size: int

    def log_p(self, ids: Int[Tensor, " tokens"]) -> Float[Tensor, "rows vocab"]:
        """At the last tokens of a text."""
        logits = self.model(input_ids=ids[None], use_cache=False).logits[0]
        return _log_p(logits, self.vocab_size)


def check_models(runner: Any, wanted: str) -> dict[str, str]:
    """What was found, by role. `wanted`: `on`, or `auto` for models that are small enough.

    Raises ModelError where a model's log-probabilities are off by more than 1e-2 in float32, or by
    more than five times its own noise in lower precision: what changes with the shape of a batch,
    and by rounding to that precision in Transformers.
    """
    model = runner.get_model()
    roles = ["teacher"] if model.settings.shared else ["teacher", "student"]
    found = {}
    for role in roles:
        reason = _reason_against(model, role, wanted, runner.device)
        found[role] = f"not compared: {reason}" if reason else _compare(runner, role)
    return found


def _reason_against(model: Any, role: str, wanted: str, device: torch.device) -> str:
    config = model.role_configs[role]
    if config.quantization is not None:
        return "its weights are quantised"
    count = sum(parameter.numel() for parameter in getattr(model, role).parameters())
    limit = _LARGEST["cpu" if device.type == "cpu" else "gpu"]
    if wanted == "auto" and count > limit:
        return f"more than {limit / 1e9:.0f}e9 parameters; --check-models on does it"
    return ""


@torch.inference_mode()
def _compare(runner: Any, role: str) -> str:
    model = runner.get_model()
    config = model.role_configs[role]
    vocab_size = model.settings.vocab_size
    reference = _Reference(_load(role, config), vocab_size)
    texts = [_text(length, vocab_size) for length in _lengths(runner, config)]
    precise = [reference.log_p(ids) for ids in texts]
    rounded = precise
    if config.dtype != torch.float32:
        reference.model.to(config.dtype)
        rounded = [reference.log_p(ids) for ids in texts]
    reports = []
    for ids, exact, coarse in zip(texts, precise, rounded, strict=True):
        pieces = (len(ids), len(ids) // 3 + 1)
        whole, parts = (_log_p(runner.role_logits(role, ids, n), vocab_size) for n in pieces)
        if not (exact.isfinite().all() and whole.isfinite().all()):
            return "not compared: logits that are not finite"
        noise = max(_distance(whole, parts), _distance(exact, coarse))
        limit = _FLOAT32_LIMIT if config.dtype == torch.float32 else _NOISES * noise
        error = max(_distance(whole, exact), _distance(parts, exact))
        if error > limit:
            raise ModelError(
                f"vLLM computes another {role} than Transformers: log-probabilities of a text of "
                f"{len(ids)} tokens are off by up to {error:.2g} nats (allowed: {limit:.2g}). Use "
                "--engine local, or --check-models off where you know that vLLM is right"
            )
        reports.append(f"{error:.1e} nats on {len(ids)} tokens (allowed: {limit:.1e})")
    return ", ".join(reports)


def _load(role: str, config: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model,
            dtype=torch.float32,
            device_map=None,
            attn_implementation="eager",
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"the {role} could not be loaded by Transformers, to compare vLLM with: {first} "
            "(--check-models off leaves this out)"
        ) from error
    return model.eval()


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
