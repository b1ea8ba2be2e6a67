"""`LocalEngine`: two Transformers models in this process, as in engines/base.py."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from optimal_sampling.config import EngineOptions, LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.distribution import kernel_note
from optimal_sampling.engines.base import Engine
from optimal_sampling.engines.local.drafting import DraftPolicy, FixedDrafts
from optimal_sampling.engines.local.loading import load_model, prepare_pair
from optimal_sampling.engines.local.round import RunSettings, Sampler
from optimal_sampling.engines.local.run import DraftCounts, GenerationLoop
from optimal_sampling.engines.local.runner import CachedModel, ModelRunner, Recordings
from optimal_sampling.engines.local.scheduler import Limits
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.types import Completion, Mode, Request
from optimal_sampling.vocabulary import Vocabulary, resolve_model

__all__ = ["LoadedPair", "LocalEngine"]

GIB = 2**30
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.75}
"""Share of the memory free after loading that caches may take, beside logits and activations."""
POSITION_BYTES = 12 * 4
"""Upper bound per id of logits, noise and temporaries of one position of one row."""


@dataclass(slots=True, eq=False)
class LoadedPair:
    """Both models in memory."""

    runners: dict[str, ModelRunner[Any]]
    """By role."""
    shared: bool
    """Both roles have the same weights, loaded once."""
    attention: str = "PyTorch SDPA"
    """Which attention runs, and why."""
    memory: int | None = None
    """Bytes free for caches after loading. GPU only, where caches are kept between runs."""

    @classmethod
    def of(cls, models: dict[str, Any], vocab_size: int, options: LocalOptions) -> LoadedPair:
        """Models by role, made ready to run.

        Raises ModelError, ConfigError, MissingDependencyError.
        """
        device = next(iter(models.values())).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams and events go to the current one
        runners, note = prepare_pair(models, vocab_size, options)
        pair = cls(runners, len(models) == 2 and models["student"] is models["teacher"], note)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            pair.memory = int(MEMORY_SHARE["cuda"] * torch.cuda.mem_get_info(device)[0])
        return pair

    @property
    def recorded_graphs(self) -> Recordings | None:
        """CUDA graphs of both models; None where none are ever recorded."""
        found = [runner.recorded_graphs() for runner in set(self.runners.values())]
        counts = [count for count in found if count is not None]
        return sum(counts, Recordings()) if counts else None


class LocalEngine(Engine):
    """Student and teacher from Transformers in one continuous batch.

    Each has its own prompts and KV cache. `captured` of a completion holds what `capture` names,
    per token, as CPU float32 [n_tokens, vocab]: `student_logits` and `teacher_logits` before
    temperature, `log_q` as drawn from.
    """

    captures = frozenset({"student_logits", "teacher_logits", "log_q"})
    options: LocalOptions
    vocabulary: Vocabulary

    def __init__(
        self,
        pair: LoadedPair,
        mixture: MixtureConfig,
        options: LocalOptions,
        vocabulary: Vocabulary,
        mode: Mode = "mixture",
    ) -> None:
        self.pair = pair
        self.mixture = mixture
        self.options = options
        self.vocabulary = vocabulary
        self.mode: Mode = mode
        self.vocab_size = vocabulary.size
        self.stop_ids = vocabulary.stop_ids
        self.draft_counts = DraftCounts()
        """Of the latest `generate` call."""

    @classmethod
    def load(
        cls,
        models: ModelConfig,
        mixture: MixtureConfig,
        options: LocalOptions,
        vocabulary: Vocabulary,
        mode: Mode = "mixture",
        load_kwargs: dict[str, Any] | None = None,
    ) -> Self:
        """Load the models. Raises ModelError, ConfigError, MissingDependencyError."""
        paths = {
            "student": resolve_model(models.student, models.student_revision, weights=True),
            "teacher": resolve_model(models.teacher, models.teacher_revision, weights=True),
        }
        shared = os.path.realpath(paths["student"]) == os.path.realpath(paths["teacher"])
        loaded: dict[str, Any] = {}
        for role in ("teacher", "student"):
            if role == "student" and shared and "teacher" in loaded:
                loaded[role] = loaded["teacher"]
            elif mode in ("mixture", role):
                loaded[role] = load_model(paths[role], models, role, load_kwargs)
        pair = LoadedPair.of(loaded, vocabulary.logit_rows, options)
        return cls(pair, mixture, options, vocabulary, mode)

    def _check_settings(self, loaded: EngineOptions) -> None:
        """As in `Engine`. Raises ConfigError too where a model that takes part was not loaded."""
        super()._check_settings(loaded)
        absent = [role for role in self.roles if role not in self.pair.runners]
        if self.pair.runners and absent:
            raise ConfigError(
                f"mode {self.mode!r} needs the {absent[0]}, and the engine was loaded for "
                f"the {' and the '.join(self.pair.runners)} only"
            )
        self.draft_counts = DraftCounts()

    @property
    def rounds(self) -> int:
        """As in `Engine`."""
        return self.draft_counts.rounds

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """As in `Engine`."""
        if not self.pair.runners:
            raise EngineError("this engine was closed; open another one")
        loop = self._new_loop()
        self.draft_counts = loop.counts
        try:
            yield from loop.completions(requests)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of memory on {self.device}: "
                f"use a smaller batch_size or kv_memory_gib ({error})"
            ) from error
        finally:
            loop.close()

    def _new_loop(self) -> GenerationLoop:
        """The loop of one `generate` call, with empty caches."""
        settings, policy = self._settings(), self._policy()
        models = self._cached_models(settings)
        for model in models:
            drafting = len(models) == 2 and model is models[0]
            model.prepare(settings.limits.rows, 1 if drafting else policy.most + 1)
        return GenerationLoop(models, settings, policy, Sampler(models, settings, policy))

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(iter(self.pair.runners.values())).device

    def _cached_models(self, settings: RunSettings) -> list[CachedModel]:
        """The models that take part with caches of as many tokens each."""
        runners = [self.pair.runners[role] for role in self.roles]
        used = set(runners)
        for runner in set(self.pair.runners.values()) - used:
            runner.drop_caches()
        tokens = settings.memory // max(1, sum(runner.bytes_per_token for runner in used))
        contexts: list[tuple[int, ...]] = [(i,) for i in range(len(runners))]
        if len(runners) == 2 and self.pair.shared:
            runners, contexts = runners[:1], [(0, 1)]
        pairs = zip(runners, contexts, strict=True)
        return [CachedModel(runner, held, tokens, settings.limits.rows) for runner, held in pairs]

    def _settings(self) -> RunSettings:
        contexts = {
            "student": self.vocabulary.student_context,
            "teacher": self.vocabulary.teacher_context,
        }
        runners = [self.pair.runners[role] for role in self.roles]
        chunked = any(runner.drafts for runner in runners)  # own caches read a prompt in one pass
        switches = tuple(runner.rope_switch for runner in runners)
        memory = self.memory_budget()
        positions = max(1, memory // (4 * POSITION_BYTES * self.vocab_size))
        limits = Limits(
            rows=min(self.options.batch_size, positions),
            prefill_chunk=self.options.prefill_chunk if chunked else sys.maxsize,
            context_lengths=tuple(contexts[role] for role in self.roles),
            positions=positions,
            kv_boundary=min(runner.kv_boundary for runner in runners),
            gather=max(runner.gather for runner in runners),
            rope_switches=switches if any(switches) else (),
        )
        return RunSettings(
            roles=self.roles,
            mixture=self.mixture,
            limits=limits,
            stop_ids=self.stop_ids,
            vocab_size=self.vocab_size,
            embeddings=tuple(runner.embeddings for runner in runners),
            memory=memory,
            capture=self.capture,
            top_tokens=self.options.top_tokens,
        )

    def _policy(self) -> DraftPolicy:
        drafts = self.options.draft_tokens if self.mode == "mixture" else 0
        lockstep = [role for role in self.roles if not self.pair.runners[role].drafts]
        if lockstep and drafts == "auto":
            drafts = 0
        if lockstep and drafts:
            raise ConfigError(
                f"the {lockstep[0]} model runs with its own cache, which cannot take drafts back; "
                "use draft_tokens auto or 0"
            )
        return DraftPolicy() if drafts == "auto" else FixedDrafts(int(drafts))

    def memory_budget(self) -> int:
        """Bytes for the KV caches: as asked, or a share of what is free now."""
        if self.options.kv_memory_gib is not None:
            return int(self.options.kv_memory_gib * GIB)
        if self.pair.memory is not None:
            return self.pair.memory
        return int(MEMORY_SHARE["cpu"] * _free_memory())

    def notes(self) -> dict[str, str]:
        """Device, precision, memory and batch in use, and the drafts of the latest run."""
        cuda = self.device.type == "cuda"
        dtype = self.pair.runners[self.roles[-1]].model.dtype
        notes = {
            "device": torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "threads": str(torch.get_num_threads()),
            "dtype": str(dtype).removeprefix("torch."),
            "kv_memory": f"{self.memory_budget() / GIB:.2f} GiB",
            "attention": self.pair.attention,
        }
        if cuda:
            kernel = kernel_note(self.device, self.mixture)
            notes["mixture"] = kernel.removeprefix("mixture kernel: ")
        if (graphs := self.pair.recorded_graphs) is not None:
            notes["cuda_graphs"] = str(graphs)
        elif cuda:
            notes["cuda_graphs"] = "none, which need Flash Attention over pages"
        notes["batch"] = self._batch_note()
        counts = self.draft_counts
        if counts.drafted:
            notes["drafts"] = (
                f"{counts.accepted} of {counts.drafted} drafted tokens accepted "
                f"in {counts.rounds} rounds"
            )
        if counts.ahead:
            notes["ahead"] = (
                f"{counts.ahead} of {counts.rounds} rounds queued before the tokens of the round "
                "before were known"
            )
        if self.pair.shared:
            notes["weights"] = (
                "the same for student and teacher, loaded once, both contexts in one forward pass"
            )
        return notes

    def _batch_note(self) -> str:
        rows, asked = self._settings().limits.rows, self.options.batch_size
        note = f"up to {rows} requests in flight"
        if rows < asked:
            note += f", not {asked}: their logits would not fit into memory"
        return note

    def close(self) -> None:
        """Drop the models."""
        for runner in self.pair.runners.values():
            runner.drop_caches()
        self.pair.runners.clear()
        if torch.cuda.is_available():
            gc.collect()  # recorded graphs and their runner know each other
            torch.cuda.empty_cache()


def _free_memory() -> int:
    """Free memory of the system or of the control group, whichever is less, in bytes."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
