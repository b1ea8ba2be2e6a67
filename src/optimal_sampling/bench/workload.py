"""What is timed: arithmetic problems of 1 to 5 steps, and two models that answer them."""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from optimal_sampling.bench.hardware import memory_bandwidth
from optimal_sampling.bench.instruments import MeasuredEngine, Recorder
from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, PromptConfig
from optimal_sampling.engines.device import resolve_device, resolve_dtype
from optimal_sampling.engines.local.engine import LoadedPair, LocalEngine
from optimal_sampling.engines.local.loading import load_model
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.toy_pair.problems import synthetic_rows
from optimal_sampling.types import Mode, Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary, resolve_model

__all__ = ["ModelPair", "Variant", "Workload", "count_tokens"]


@dataclass(frozen=True)
class Workload:
    """Requests, and whether texts end by themselves (uneven lengths) or all at the same length."""

    requests: tuple[Request, ...]
    natural_end: bool


@dataclass(frozen=True)
class Variant:
    """Settings of the local engine that rows of a table differ in."""

    mode: Mode = "mixture"
    draft_tokens: int | Literal["auto"] = "auto"
    batch_invariant: bool = True
    kv_memory_gib: float | None = None
    acceptance: float | None = None
    """Emulated acceptance of drafts; None: the pair's own."""
    capture: frozenset[str] = frozenset()


class ModelPair:
    """The models of a benchmark, in the local engine and as Transformers loads them."""

    natural = True
    """Its texts can end by themselves."""
    has_assistant = True
    """Its student can draft in Transformers' assisted generation."""
    acceptance: float | None = None
    """Emulated acceptance of drafts; None: drafts are accepted or rejected as they are."""
    kv_memory_gib: float | None = None
    """Budget of the KV caches; None: the engine's own choice."""
    equal_tokens = 48
    """Length of texts that do not end by themselves."""
    most_tokens = 160
    """Longest text that ends by itself."""

    def __init__(self, models: ModelConfig, vocabulary: Vocabulary | None = None) -> None:
        self.models = models
        self.vocabulary = vocabulary or Vocabulary.load(models.student, models.teacher)
        self._engines: dict[bool, MeasuredEngine] = {}
        self._stock: dict[str, Any] = {}

    @property
    def names(self) -> dict[str, Any]:
        """The models, for the line of JSON."""
        models = self.models
        return {"teacher": models.teacher, "student": models.student, "dtype": models.dtype}

    @property
    def label(self) -> str:
        """What a table's title has to add: "" or the emulated acceptance."""
        return "" if self.acceptance is None else f", emulated acceptance {self.acceptance:g}"

    @cached_property
    def bandwidth(self) -> float:
        """Bandwidth of the memory, measured once, in bytes per second."""
        return memory_bandwidth(self.device)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return resolve_device(self.models.device)

    @property
    def padded(self) -> bool:
        """Whether `batch_invariant` changes shapes here."""
        dtype = resolve_dtype(self.models.dtype, self.device)
        return self.device.type == "cpu" and dtype == torch.float32

    def workload(
        self, count: int, tokens: int | None = None, prompt: PromptConfig | None = None
    ) -> Workload:
        """The first `count` synthetic problems; `tokens`: every completion has exactly so many."""
        renderer = PromptRenderer(prompt or PromptConfig(), self.vocabulary)
        requests = []
        for index, row in enumerate(synthetic_rows(0, count)):
            rendered = renderer.render(row)
            ids = tuple(rendered.student_ids), tuple(rendered.teacher_ids)
            name = prompt_id(rendered.student_text, rendered.teacher_text)
            requests.append(Request(name, index, 0, *ids, tokens or self.most_tokens))
        return Workload(tuple(requests), natural_end=tokens is None)

    def engine(
        self,
        workload: Workload,
        batch_size: int,
        variant: Variant = Variant(),
        recorder: Recorder | None = None,
    ) -> MeasuredEngine:
        """The local engine with these settings; its texts end as the workload says."""
        loaded = self._loaded(variant.batch_invariant and self.padded)
        options = replace(
            loaded.options,
            batch_size=batch_size,
            draft_tokens=variant.draft_tokens,
            kv_memory_gib=variant.kv_memory_gib or self.kv_memory_gib,
        )
        engine = loaded.view(mode=variant.mode, options=options, capture=variant.capture)
        engine.recorder = recorder or Recorder()
        given = variant.acceptance
        engine.acceptance = self.acceptance if given is None else given
        if not workload.natural_end:
            engine.stop_ids = frozenset()
        return engine

    def stock(self, role: str) -> Any:
        """A model as Transformers loads it, with its own attention."""
        if role not in self._stock:
            self._stock[role] = self._load_stock(role)
        return self._stock[role]

    def stock_teacher_for_assistant(self) -> Any:
        """The stock teacher with as many rows as the student, as assisted generation requires."""
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

    def _loaded(self, batch_invariant: bool) -> MeasuredEngine:
        if batch_invariant not in self._engines:
            options = LocalOptions(batch_invariant=batch_invariant)
            loaded = self._load(options)
            self._engines[batch_invariant] = MeasuredEngine(
                loaded, MixtureConfig(), options, self.vocabulary
            )
        return self._engines[batch_invariant]

    def _load(self, options: LocalOptions) -> LoadedPair:
        return LocalEngine.load(self.models, MixtureConfig(), options, self.vocabulary).pair

    def _load_stock(self, role: str) -> Any:
        name = self.models.teacher if role == "teacher" else self.models.student
        return load_model(resolve_model(name), self.models, role)


def count_tokens(engine: LocalEngine, workload: Workload) -> int:
    """Draw every text of a workload; the number of tokens."""
    return sum(len(completion.token_ids) for completion in engine.generate(workload.requests))
