"""What is timed: arithmetic problems of 1 to 5 steps, and two models that answer them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch.utils.benchmark import Timer

from optimal_sampling.bench.instruments import MeasuredEngine
from optimal_sampling.config import (
    Attention,
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    PromptConfig,
)
from optimal_sampling.engines.device import resolve_device, resolve_dtype
from optimal_sampling.engines.local.engine import LoadedPair, LocalEngine
from optimal_sampling.engines.local.loading import load_model
from optimal_sampling.prompts import PromptRenderer
from optimal_sampling.toy_pair.problems import synthetic_rows
from optimal_sampling.types import Mode, Request, prompt_id
from optimal_sampling.vocabulary import Vocabulary, resolve_model

__all__ = [
    "COPIED_MEBIBYTES",
    "ModelPair",
    "Variant",
    "Workload",
    "memory_bandwidth",
    "weight_bytes",
]

COPIED_MEBIBYTES = {"cpu": 512, "cuda": 2048}
"""Size of what is copied to measure the bandwidth of memory: far more than caches hold."""


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
    acceptance: float | None = None
    """Emulated acceptance of drafts; None: the pair's own."""
    capture: frozenset[str] = frozenset()
    mixture: MixtureConfig = field(default_factory=MixtureConfig)


class ModelPair:
    """The models of a benchmark, in the local engine and as Transformers loads them."""

    natural = True
    """Its texts can end by themselves, and its student can draft in assisted generation."""
    acceptance: float | None = None
    """Emulated acceptance of drafts; None: drafts are accepted or rejected as they are."""
    kv_memory_gib: float | None = None
    """Budget of the KV caches; None: the engine's own choice."""
    attention: Attention = "auto"
    """As in `LocalOptions`."""
    equal_tokens = 48
    """Length of texts that do not end by themselves."""
    most_tokens = 160
    """Longest text that ends by itself."""

    def __init__(self, models: ModelConfig, vocabulary: Vocabulary | None = None) -> None:
        self.models = models
        self.vocabulary = vocabulary or Vocabulary.load(models.student, models.teacher)
        self.device = resolve_device(models.device)
        self.dtype = resolve_dtype(models.dtype, self.device)
        self.padded = self.device.type == "cpu" and self.dtype == torch.float32
        """Whether `batch_invariant` changes shapes here."""
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
        return memory_bandwidth(self.device, COPIED_MEBIBYTES[self.device.type])

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
        self, workload: Workload, batch_size: int, variant: Variant = Variant()
    ) -> MeasuredEngine:
        """The local engine with these settings; its texts end as the workload says."""
        loaded = self.loaded(variant.batch_invariant)
        options = replace(
            loaded.options,
            batch_size=batch_size,
            draft_tokens=variant.draft_tokens,
            kv_memory_gib=self.kv_memory_gib,
        )
        engine = loaded.view(
            variant.mixture, mode=variant.mode, options=options, capture=variant.capture
        )
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

    @cached_property
    def stock_teacher_for_assistant(self) -> Any:
        """The stock teacher with as many rows as the student, as assisted generation requires."""
        model = copy.deepcopy(self.stock("teacher"))
        model.resize_token_embeddings(self.stock("student").config.vocab_size)
        return model

    @property
    def drafts(self) -> bool:
        """Whether drafts can be taken back: no model runs with its own cache."""
        return all(runner.drafts for runner in self.loaded().pair.runners.values())

    def close(self) -> None:
        """Drop the models."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()
        self._stock.clear()

    def loaded(self, batch_invariant: bool = True) -> MeasuredEngine:
        """The engine as it was loaded, at the first use."""
        key = batch_invariant and self.padded
        if key not in self._engines:
            options = LocalOptions(batch_invariant=key, attention=self.attention)
            models = self._load(options)
            self._engines[key] = MeasuredEngine(models, MixtureConfig(), options, self.vocabulary)
        return self._engines[key]

    def _load(self, options: LocalOptions) -> LoadedPair:
        return LocalEngine.load(self.models, MixtureConfig(), options, self.vocabulary).pair

    def _load_stock(self, role: str) -> Any:
        return load_model(resolve_model(getattr(self.models, role)), self.models, role)

    def roofline(self, batch: int, cached: float) -> float:
        """Most tokens per second of lockstep decoding, with `cached` tokens in each cache.

        Every round reads both models' weights (once where they are the same) and both contexts'
        caches, at the bandwidth of the memory.
        """
        runners = self.loaded().pair.runners.values()
        weights = sum(weight_bytes(runner.model) for runner in set(runners))
        per_token = sum(runner.bytes_per_token for runner in runners)
        caches = batch * cached * per_token
        return batch * self.bandwidth / (weights + caches)


def memory_bandwidth(device: torch.device, mebibytes: int) -> float:
    """Bytes per second of a large copy (read and written) or sum, the best of 5."""
    source = torch.ones(mebibytes * 2**18, device=device)
    given = {"source": source, "target": torch.empty_like(source)}
    threads = torch.get_num_threads()

    def passes_per_second(code: str) -> float:
        timer = Timer(code, globals=given, num_threads=threads)
        return 1 / min(timer.timeit(1).median for _ in range(5))

    copied = 2 * passes_per_second("target.copy_(source)")
    read = passes_per_second("source.sum()")
    return source.nbytes * max(copied, read)


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a forward pass reads; an embedding alone is only looked up."""
    # by attribute, because the engine replaces linear layers by its own forms of them
    layers = [module for module in model.modules() if hasattr(module, "in_features")]
    rest: set[torch.Tensor] = set(model.parameters())
    rest.discard(model.get_input_embeddings().weight)
    total = 0
    for layer in layers:
        rest.difference_update(layer.parameters())
        total += _layer_bytes(layer)
    return total + sum(parameter.nbytes for parameter in rest)


def _layer_bytes(layer: Any) -> int:
    """Bytes of a linear layer. The engine's own kinds have float32 weights, no parameters."""
    own = dict(layer.named_parameters(recurse=False))
    total = sum(parameter.nbytes for parameter in own.values())
    if "weight" not in own:
        total += 4 * layer.in_features * layer.out_features
    return int(total)
