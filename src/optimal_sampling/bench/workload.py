"""What is timed: arithmetic problems of 1 to 5 steps, and a pair of models to answer them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

import torch

from optimal_sampling.bench.roofline import memory_bandwidth
from optimal_sampling.bench.watch import MeasuringEngine, Watch
from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, PromptConfig
from optimal_sampling.engines.device import resolve_device, resolve_dtype
from optimal_sampling.toy_pair.problems import synthetic_rows
from optimal_sampling.types import Completion, Mode, Request, prompt_id
from optimal_sampling.vocabulary import PromptRenderer, Vocabulary, resolve_model

__all__ = ["Bench", "Workload", "describe_lengths"]

MOST_TOKENS = 160


@dataclass(frozen=True)
class Workload:
    """Requests, and whether texts end by themselves (uneven lengths) or all after the same number of tokens."""

    requests: tuple[Request, ...]
    natural_end: bool


class Bench:
    """The models of a benchmark, loaded once: in our engine, and as Transformers loads them."""

    natural = True
    """Its texts can end by themselves."""
    has_assistant = True
    """Drafts of its student mean something to Transformers."""
    equal_tokens = 48
    """Length of texts that do not end by themselves."""

    def __init__(self, models: ModelConfig, vocabulary: Vocabulary | None = None) -> None:
        self.models = models
        self.vocabulary = vocabulary or Vocabulary.load(models.student, models.teacher)
        self.acceptance: float | None = None
        """Of drafts, where it is emulated."""
        self._engines: dict[bool, MeasuringEngine] = {}
        self._stock: dict[str, Any] = {}

    @property
    def names(self) -> dict[str, Any]:
        """What was measured, for the line of JSON."""
        return {
            "teacher": self.models.teacher,
            "student": self.models.student,
            "dtype": self.models.dtype,
        }

    @property
    def label(self) -> str:
        """What a table's title has to add: "" or the emulated acceptance."""
        return "" if self.acceptance is None else f", emulated acceptance {self.acceptance:g}"

    @cached_property
    def bandwidth(self) -> float:
        """Of memory, measured once, in bytes per second."""
        return memory_bandwidth(self.device)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return resolve_device(self.models.device)

    @property
    def padded(self) -> bool:
        """Whether shapes that make results independent of the batch differ from the fastest ones."""
        return (
            self.device.type == "cpu"
            and resolve_dtype(self.models.dtype, self.device) == torch.float32
        )

    def twin(self) -> Bench:
        """The teacher as its own student."""
        return Bench(replace(self.models, student=self.models.teacher))

    def workload(
        self, count: int, tokens: int | None = None, prompt: PromptConfig | None = None
    ) -> Workload:
        """The first `count` synthetic problems; `tokens`: every completion has exactly so many."""
        renderer = PromptRenderer(prompt or PromptConfig(), self.vocabulary)
        requests: list[Request] = []
        for row in synthetic_rows(0, count):
            rendered = renderer.render(row)
            ids = tuple(rendered.student_ids), tuple(rendered.teacher_ids)
            name = prompt_id(rendered.student_text, rendered.teacher_text)
            requests.append(Request(name, len(requests), 0, *ids, tokens or MOST_TOKENS))
        return Workload(tuple(requests), natural_end=tokens is None)

    def engine(
        self,
        workload: Workload,
        batch_size: int,
        *,
        mode: Mode = "mixture",
        draft_tokens: int | Literal["auto"] = "auto",
        batch_invariant: bool = True,
        kv_memory_gib: float | None = None,
        capture: frozenset[str] = frozenset(),
        watch: Watch | None = None,
        acceptance: float | None = None,
    ) -> MeasuringEngine:
        """Our engine; its texts end as the workload says. `acceptance`: emulated, instead of this pair's own rate."""
        key = batch_invariant and self.padded
        if key not in self._engines:
            self._engines[key] = self._load(key)
        loaded = self._engines[key]
        options = replace(
            loaded.options,
            batch_size=batch_size,
            draft_tokens=draft_tokens,
            kv_memory_gib=kv_memory_gib,
        )
        engine = loaded.view(mode=mode, options=options, capture=capture)
        engine.acceptance = self.acceptance if acceptance is None else acceptance
        engine.watch = watch
        if not workload.natural_end:
            engine.stop_ids = frozenset()
        return engine

    def stock(self, role: str) -> Any:
        """A model as Transformers loads it, with its own attention."""
        if role not in self._stock:
            self._stock[role] = self._load_stock(role)
        return self._stock[role]

    def stock_teacher_for_assistant(self) -> Any:
        """The stock teacher with the student's number of rows, without which Transformers refuses the assistant."""
        if "assisted" not in self._stock:
            model = copy.deepcopy(self.stock("teacher"))
            model.resize_token_embeddings(self.stock("student").config.vocab_size)
            self._stock["assisted"] = model
        return self._stock["assisted"]

    def close(self) -> None:
        """Drop the models."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._stock.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _load(self, batch_invariant: bool) -> MeasuringEngine:
        options = LocalOptions(batch_invariant=batch_invariant)
        return MeasuringEngine.load(self.models, MixtureConfig(), options, self.vocabulary)

    def _load_stock(self, role: str) -> Any:
        from optimal_sampling.engines.local.loading import load_model

        name = self.models.teacher if role == "teacher" else self.models.student
        return load_model(resolve_model(name), self.models, role)


def describe_lengths(requests: Sequence[Request], completions: Sequence[Completion]) -> str:
    """Mean and maximum of prompts and completions, in tokens."""
    prompts = [len(r.teacher_prompt_ids) for r in requests]
    texts = [len(c.token_ids) for c in completions]
    return (
        f"prompts {fmean(prompts):.1f} (most {max(prompts)}), "
        f"completions {fmean(texts):.1f} (most {max(texts)}, mean/most {fmean(texts) / max(texts):.2f}) tokens"
    )
