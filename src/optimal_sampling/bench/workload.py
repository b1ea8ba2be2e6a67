"""What is timed: arithmetic problems of 1 to 5 steps, and a pair of models to answer them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from optimal_sampling.config import EngineConfig, MixtureConfig, ModelConfig, PromptConfig
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.toy_pair.problems import synthetic_rows
from optimal_sampling.types import Completion, Request, prompt_id
from optimal_sampling.vocabulary import PromptRenderer, Vocabulary, resolve_model

__all__ = ["Bench", "Workload", "make_workload"]

MOST_TOKENS = 160


@dataclass(frozen=True)
class Workload:
    """Requests, and whether texts end by themselves (uneven lengths) or all after the same number of tokens."""

    requests: tuple[Request, ...]
    natural_end: bool

    def first(self, count: int) -> Workload:
        """A part of it, for settings that are slow."""
        return replace(self, requests=self.requests[:count])


class Bench:
    """The models of a benchmark, loaded once: in our engine, and as Transformers loads them."""

    def __init__(self, models: ModelConfig) -> None:
        self.models = models
        self.vocabulary = Vocabulary.load(models.student, models.teacher)
        self._engines: dict[bool, LocalEngine] = {}
        self._stock: dict[str, Any] = {}

    def engine(self, workload: Workload, batch_size: int, batch_invariant: bool = True) -> LocalEngine:
        """Our engine; its texts end as the workload says."""
        if batch_invariant not in self._engines:
            options = EngineConfig(batch_invariant=batch_invariant)
            engine = LocalEngine.load(self.models, MixtureConfig(), options, self.vocabulary)
            self._engines[batch_invariant] = engine
        engine = self._engines[batch_invariant].with_mixture(batch_size=batch_size)
        if not workload.natural_end:
            engine.stop_ids = frozenset()
        return engine

    def stock(self, role: str) -> Any:
        """A model as Transformers loads it, with its own attention."""
        if role not in self._stock:
            from optimal_sampling.engines.local.loading import load_model

            name = self.models.teacher if role == "teacher" else self.models.student
            self._stock[role] = load_model(resolve_model(name), self.models, role)
        return self._stock[role]

    def stock_teacher_for_assistant(self) -> Any:
        """The stock teacher with the student's number of rows, without which Transformers refuses the assistant."""
        if "assisted" not in self._stock:
            model = copy.deepcopy(self.stock("teacher"))
            model.resize_token_embeddings(self.stock("student").config.vocab_size)
            self._stock["assisted"] = model
        return self._stock["assisted"]


def make_workload(bench: Bench, count: int, tokens: int | None = None, seed: int = 0) -> Workload:
    """The first `count` synthetic problems; `tokens`: every completion has exactly so many."""
    renderer = PromptRenderer(PromptConfig(), bench.vocabulary)
    requests: list[Request] = []
    for row in synthetic_rows(seed, count):
        prompt = renderer.render(row)
        ids = tuple(prompt.student_ids), tuple(prompt.teacher_ids)
        name = prompt_id(prompt.student_text, prompt.teacher_text)
        requests.append(Request(name, len(requests), seed, *ids, tokens or MOST_TOKENS))
    return Workload(tuple(requests), natural_end=tokens is None)


def describe_lengths(requests: Sequence[Request], completions: Sequence[Completion]) -> str:
    """Mean and maximum of prompts and completions, in tokens."""
    prompts = [len(r.teacher_prompt_ids) for r in requests]
    texts = [len(c.token_ids) for c in completions]
    return (
        f"prompts {fmean(prompts):.1f} (most {max(prompts)}), "
        f"completions {fmean(texts):.1f} (most {max(texts)}, mean/most {fmean(texts) / max(texts):.2f}) tokens"
    )
