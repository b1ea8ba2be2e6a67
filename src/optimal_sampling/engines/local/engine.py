"""`LocalEngine`: two Transformers models in this process, behind the contract of engines/base.py."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from optimal_sampling.config import EngineOptions, LocalOptions, MixtureConfig, ModelConfig
from optimal_sampling.distribution import kernel_note
from optimal_sampling.engines.base import Engine
from optimal_sampling.engines.local.drafting import DraftPolicy, FixedDrafts
from optimal_sampling.engines.local.drawing import Drawer, RunSetting
from optimal_sampling.engines.local.forward import ModelRunner
from optimal_sampling.engines.local.lane import Lane
from optimal_sampling.engines.local.loading import load_model, prepare_pair
from optimal_sampling.engines.local.paged.cache import PAGE
from optimal_sampling.engines.local.paged.forward import PagedRunner
from optimal_sampling.engines.local.run import Run
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.types import Completion, Mode, Request
from optimal_sampling.vocabulary import Vocabulary, resolve_model

__all__ = ["LoadedPair", "LocalEngine"]

GIB = 2**30
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.75}
"""Share of the memory free after loading that the caches may take; the rest is for logits and activations."""


@dataclass(slots=True, eq=False)
class LoadedPair:
    """Both models in memory. `shared`: they are the same weights, loaded once."""

    runners: dict[str, ModelRunner]
    shared: bool
    attention: str = "PyTorch SDPA"
    """Which attention runs, and why, for people."""
    memory: int | None = None
    """Bytes that were free for caches once the models were loaded (GPU only, where caches outlive a run)."""

    @classmethod
    def of(cls, models: dict[str, Any], vocab_size: int, options: LocalOptions) -> LoadedPair:
        """Models by role, made ready to run. Raises ModelError, ConfigError, MissingDependencyError."""
        device = next(iter(models.values())).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # streams, events and kernels go to the current one
        runners, note = prepare_pair(models, vocab_size, options)
        pair = cls(runners, len(models) == 2 and models["student"] is models["teacher"], note)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            pair.memory = int(MEMORY_SHARE["cuda"] * torch.cuda.mem_get_info(device)[0])
        return pair

    @property
    def paged(self) -> bool:
        """Rows live in pages, not in slots."""
        return all(isinstance(runner, PagedRunner) for runner in self.runners.values())


class LocalEngine(Engine):
    """Student and teacher from Transformers, each with its own prompts and KV cache, in one continuous batch.

    `captured` of a completion holds what `capture` names, per token, as CPU float32 [n_tokens, vocab]:
    `student_logits` and `teacher_logits` before temperature, `log_q` as drawn from.
    """

    captures = frozenset({"student_logits", "teacher_logits", "log_q"})
    options: LocalOptions

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
        self.drawer: Callable[[list[Lane], RunSetting, DraftPolicy], Drawer] = Drawer
        """What makes the drawer of a run; measurements put their own here."""
        self.last_run: Run | None = None
        """The state of the latest `generate` call, for benchmarks and tests."""

    @classmethod
    def load(
        cls,
        models: ModelConfig,
        mixture: MixtureConfig,
        options: LocalOptions,
        vocabulary: Vocabulary,
        mode: Mode = "mixture",
        load_kwargs: dict[str, Any] | None = None,
    ) -> LocalEngine:
        """Load the models. Raises ModelError, ConfigError, MissingDependencyError."""
        paths = {"student": resolve_model(models.student), "teacher": resolve_model(models.teacher)}
        shared = os.path.realpath(paths["student"]) == os.path.realpath(paths["teacher"])
        loaded: dict[str, Any] = {}
        for role in ("teacher", "student"):
            if role == "student" and shared:
                loaded[role] = loaded["teacher"]
            elif mode in ("mixture", role):
                loaded[role] = load_model(paths[role], models, role, load_kwargs)
        return cls(
            LoadedPair.of(loaded, vocabulary.size, options), mixture, options, vocabulary, mode
        )

    def view(
        self,
        mixture: MixtureConfig | None = None,
        mode: Mode | None = None,
        options: EngineOptions | None = None,
        capture: frozenset[str] = frozenset(),
    ) -> Self:
        """As in `Engine`. Raises ConfigError too where a model that takes part was not loaded."""
        view = super().view(mixture, mode, options, capture)
        absent = [role for role in view.roles if role not in self.pair.runners]
        if self.pair.runners and absent:
            raise ConfigError(
                f"mode {view.mode!r} needs the {absent[0]}, and the engine was loaded for "
                f"the mode {self.mode!r}"
            )
        view.last_run = None
        return view

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Serve the requests; see `Engine`."""
        if not self.pair.runners:
            raise EngineError("this engine was closed; open another one")
        setting, policy = self._setting(), self._policy()
        lanes = self._lanes(setting.pages)
        self.last_run = Run(lanes, setting, policy, self.drawer(lanes, setting, policy))
        try:
            yield from self.last_run.completions(requests)
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"out of memory on {self.device}: use a smaller batch_size or kv_memory_gib ({error})"
            ) from error
        finally:
            for lane in self.last_run.lanes:
                lane.close()

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(iter(self.pair.runners.values())).device

    def _lanes(self, pages: int | None) -> list[Lane]:
        runners = [self.pair.runners[role] for role in self.roles]
        for runner in self.pair.runners.values():
            if isinstance(runner, PagedRunner):
                runner.drop_caches(keep=pages if runner in runners else None)
        if len(runners) == 2 and self.pair.shared:
            return [Lane(runners[0], (0, 1), pages)]
        return [Lane(runner, (i,), pages) for i, runner in enumerate(runners)]

    def _pages(self, memory: int) -> int | None:
        """Pages of each cache: as many for one model as for the other."""
        if not self.pair.paged:
            return None
        runners = {self.pair.runners[role] for role in self.roles}
        return max(
            1, memory // (PAGE * sum(runner.bytes_per_token for runner in runners)) - 1
        )  # one is scratch

    def _setting(self) -> RunSetting:
        contexts = {
            "student": self.vocabulary.student_context,
            "teacher": self.vocabulary.teacher_context,
        }
        memory = self.memory_budget()
        positions = max(1, memory // (4 * self._position_bytes()))
        return RunSetting(
            roles=self.roles,
            mixture=self.mixture,
            options=replace(self.options, batch_size=min(self.options.batch_size, positions)),
            stop_ids=self.stop_ids,
            vocab_size=self.vocab_size,
            context_lengths=tuple(contexts[role] for role in self.roles),
            embeddings=tuple(self.pair.runners[role].embeddings for role in self.roles),
            memory=memory,
            pages=self._pages(memory),
            positions=positions,
            capture=self.capture,
        )

    def _policy(self) -> DraftPolicy:
        drafts = self.options.draft_tokens if self.mode == "mixture" else 0
        return DraftPolicy() if drafts == "auto" else FixedDrafts(int(drafts))

    def _position_bytes(self) -> int:
        """Logits, noise and temporaries of one position of one row, generously."""
        return 12 * 4 * self.vocab_size

    def memory_budget(self) -> int:
        """Bytes for the KV caches: as asked, or a share of what is free now."""
        if self.options.kv_memory_gib is not None:
            return int(self.options.kv_memory_gib * GIB)
        if self.pair.memory is not None:
            return self.pair.memory
        return int(MEMORY_SHARE["cpu"] * _free_memory())

    def notes(self) -> dict[str, str]:
        """Device, precision, memory and batch in use, and what speculation did in the latest run."""
        runner = self.pair.runners[self.roles[-1]]
        notes = {
            "device": torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else "cpu",
            "threads": str(torch.get_num_threads()),
            "dtype": str(runner.model.dtype).removeprefix("torch."),
            "kv_memory": f"{self.memory_budget() / GIB:.2f} GiB",
            "attention": self.pair.attention,
        }
        if self.device.type == "cuda":
            notes["mixture"] = kernel_note(self.device, self.mixture).removeprefix(
                "mixture kernel: "
            )
        if self.pair.paged:
            notes["cuda_graphs"] = self._graphs_note()
        rows = self._setting().options.batch_size
        notes["batch"] = f"up to {rows} requests in flight"
        if rows < self.options.batch_size:
            notes["batch"] += (
                f", not {self.options.batch_size}: their logits would not fit into memory"
            )
        if self.last_run is not None and self.last_run.drafted:
            drafted, accepted = self.last_run.drafted, self.last_run.accepted
            notes["drafts"] = (
                f"{accepted} of {drafted} drafted tokens accepted in {self.last_run.rounds} rounds"
            )
        if self.pair.shared:
            notes["weights"] = (
                "the same for student and teacher, loaded once, both contexts in one forward pass"
            )
        return notes

    def _graphs_note(self) -> str:
        graphs = [
            g
            for r in set(self.pair.runners.values())
            if isinstance(r, PagedRunner)
            for g in r.graphs.values()
        ]
        off = sorted({g.off for g in graphs if g.off})
        return (
            f"off, because recording failed: {off[0]}"
            if off
            else f"{sum(map(len, graphs))} shapes recorded"
        )

    def close(self) -> None:
        """Drop the models."""
        for runner in self.pair.runners.values():
            if isinstance(runner, PagedRunner):
                runner.drop_caches()
        self.pair.runners.clear()
        if torch.cuda.is_available():
            gc.collect()  # recorded graphs and their runner know each other
            torch.cuda.empty_cache()


def _free_memory() -> int:
    """Free memory in bytes: the system's, or the control group's where that is less."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))
