"""Log-probability of given completions under one model, by its stock forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from optimal_sampling.config import ModelConfig
from optimal_sampling.engines.local.loading import load_model
from optimal_sampling.vocabulary import resolve_model

__all__ = ["score"]

_CHUNK = 1 << 24  # logits that are normalised together


@torch.inference_mode()
def score(config: ModelConfig, pairs: Iterable[tuple[list[int], list[int]]]) -> Iterator[float]:
    """Sum of log p(token) over each completion, at temperature 1, under the student of the config.

    `pairs`: ids of a prompt and of what follows it. One forward pass each. Raises ModelError.
    """
    folder = resolve_model(config.student, config.student_revision, weights=True)
    model = load_model(folder, config, "student")
    for prompt, completion in pairs:
        yield _score(model, prompt, completion)


def _score(model: Any, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([prompt + completion], device=model.device)
    logits = model(ids[:, :-1], use_cache=False, logits_to_keep=len(completion)).logits[0]
    targets = ids[0, -len(completion) :, None]
    height = max(1, _CHUNK // logits.shape[1])
    starts = range(0, len(completion), height)
    return sum(_log_p(logits[i : i + height], targets[i : i + height]) for i in starts)


def _log_p(logits: Tensor, tokens: Tensor) -> float:
    log_p = logits.float().log_softmax(-1)
    return float(log_p.gather(-1, tokens).double().sum())
