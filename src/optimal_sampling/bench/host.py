"""CPU time of the paged engine's rounds, with stand-ins for all that a GPU would compute.

Scheduler, pages, layout, copies and traces are the engine's own. Models, drafts and draws give
what was prepared, and a recorded graph does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Bool, Float32
from torch import Tensor, nn

from optimal_sampling.bench.harness import Report, make_table
from optimal_sampling.bench.subcommands import HostOptions
from optimal_sampling.config import LocalOptions, MixtureConfig
from optimal_sampling.distribution import Drawn
from optimal_sampling.engines.local.engine import LoadedPair, LocalEngine
from optimal_sampling.engines.local.paged.page_manager import PAGE
from optimal_sampling.engines.local.paged.page_runner import PageRunner
from optimal_sampling.engines.local.round import SampledRound, Sampler
from optimal_sampling.engines.local.round_noise import RoundNoise
from optimal_sampling.engines.local.run import GenerationLoop
from optimal_sampling.engines.local.scheduler import RoundPlan, Sequence
from optimal_sampling.errors import EngineError
from optimal_sampling.types import TRACE_FIELDS, Request
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["HostCost", "measure", "run"]

VOCAB = 16
"""Token ids: so few that copies of logits cost nothing."""
DRAFT, OTHER = 1, 2
"""The id of every draft, and that of a token that differs from its draft."""
TOKEN_BYTES = 2**20
"""Of the caches, none of which is ever written: so much that memory bounds nothing."""
PREPARED_ROUNDS = 32
"""Rounds whose draws are prepared; they repeat."""


@dataclass
class HostClock:
    """CPU seconds of this thread, from a round's copy to the host to the next replay."""

    waits: list[float] = field(default_factory=list)
    """One per round that followed another with recorded graphs alone."""
    _copied: float | None = None

    def copied(self) -> None:
        """The tokens of a round are on the host."""
        self._copied = time.thread_time()

    def replayed(self) -> None:
        """A graph is replayed; the first after a copy ends the wait."""
        if self._copied is not None:
            self.waits.append(time.thread_time() - self._copied)
            self._copied = None

    def eager(self) -> None:
        """A forward pass is launched kernel by kernel, so the GPU waits for something else."""
        self._copied = None


class ZeroModel(nn.Module):
    """A model whose logits are zeros."""

    device = torch.device("cpu")
    dtype = torch.bfloat16

    def __init__(self, clock: HostClock) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 1)
        self.clock = clock
        config = SimpleNamespace(max_position_embeddings=None)
        self.config = SimpleNamespace(get_text_config=lambda: config)

    def get_input_embeddings(self) -> nn.Module:
        """Of as many ids as there are."""
        return self.embedding

    def forward(self, *, logits_to_keep: int, **inputs: Any) -> SimpleNamespace:
        """Logits at the last tokens."""
        self.clock.eager()
        return SimpleNamespace(logits=torch.zeros(1, logits_to_keep, VOCAB, dtype=self.dtype))


def no_attention(*arguments: Any) -> Tensor:
    """Stands where a backend is asked for; `ZeroModel` never calls it."""
    raise AssertionError("a model without attention called it")


def idle_recorder(clock: HostClock) -> Callable[[Callable[[], None]], Callable[[], object]]:
    """Records a forward pass that leaves its first result where it is."""

    def record(forward: Callable[[], None]) -> Callable[[], object]:
        forward()
        return clock.replayed

    return record


@dataclass(frozen=True)
class PreparedDraw(Drawn):
    """A draw that is packed already."""

    packed: Float32[Tensor, "rows columns"] | None = None
    clock: HostClock | None = None

    def pack(self) -> Float32[Tensor, "rows columns"]:
        """The host has waited for it."""
        assert self.packed is not None
        assert self.clock is not None
        self.clock.copied()
        return self.packed


def prepared_draw(accepted: Bool[Tensor, "rows width"], clock: HostClock) -> PreparedDraw:
    """Tokens that are equal to their drafts where they are accepted, and a trace of any numbers."""
    tokens = torch.where(accepted, DRAFT, OTHER).reshape(-1)
    good = torch.zeros(len(tokens), dtype=torch.bool)
    plain = Drawn(tokens, torch.rand(len(tokens), len(TRACE_FIELDS)), good, good)
    return PreparedDraw(tokens, plain.trace, good, good, packed=plain.pack(), clock=clock)


class HostSampler(Sampler):
    """Queues what a GPU would compute, and computes none of it."""

    clock: HostClock
    acceptance: float

    def prepare(self, clock: HostClock, acceptance: float) -> None:
        """Behave as on a GPU."""
        self.clock, self.acceptance = clock, acceptance
        self.overlap.works = True
        self.measures_confidence = False
        self._rounds = 0
        self._draws: dict[tuple[int, ...], list[PreparedDraw]] = {}

    def sample(
        self, plan: RoundPlan, rows: list[Sequence], before: SampledRound | None = None
    ) -> SampledRound:
        """One round."""
        self._rounds += 1
        return super().sample(plan, rows, before)

    def _drafted(self, logits: Tensor, noise: RoundNoise, offset: int) -> Tensor:
        return torch.full((len(logits),), DRAFT)

    def _draw(self, logits: Any, noise: RoundNoise) -> Drawn:
        shape = tuple(logits[0].shape[:2])
        if shape not in self._draws:
            generator = torch.Generator().manual_seed(0)
            rates = torch.rand(PREPARED_ROUNDS, *shape, generator=generator)
            self._draws[shape] = [prepared_draw(r < self.acceptance, self.clock) for r in rates]
        return self._draws[shape][self._rounds % PREPARED_ROUNDS]


class HostEngine(LocalEngine):
    """The paged engine of a pair of models that compute nothing."""

    clock: HostClock
    acceptance: float = 0.9

    @classmethod
    def of(cls, batch: int, draft_tokens: int, options: HostOptions) -> HostEngine:
        """An engine for so many texts at once."""
        clock = HostClock()
        longest = options.prompt_tokens + options.new_tokens + draft_tokens
        tokens = batch * (longest + 5 * PAGE) + PAGE
        runners = {}
        for role in ("student", "teacher"):
            runner = PageRunner(ZeroModel(clock), VOCAB, TOKEN_BYTES, no_attention)
            runner.new_recorder = lambda: idle_recorder(clock)
            runners[role] = runner
        memory = len(runners) * tokens * TOKEN_BYTES / 2**30
        local = LocalOptions(batch_size=batch, draft_tokens=draft_tokens, kv_memory_gib=memory)
        vocabulary = Vocabulary(VOCAB, frozenset({0}), longest, longest)
        engine = cls(LoadedPair(dict(runners), shared=False), MixtureConfig(), local, vocabulary)
        engine.clock, engine.acceptance = clock, options.acceptance
        return engine

    def _new_loop(self) -> GenerationLoop:
        loop = super()._new_loop()
        sampler = HostSampler(loop.models, loop.settings, loop.policy)
        sampler.prepare(self.clock, self.acceptance)
        loop.sampler = sampler
        return loop


@dataclass(frozen=True)
class HostCost:
    """CPU milliseconds of the host."""

    batch: int
    draft_tokens: int
    wait: float
    """From the copy of a round's tokens to the next replay: the median round."""
    round: float
    """All that the host does in a round, prompts and completions included: the mean."""
    token: float
    """The same per token."""


def measure(batch: int, draft_tokens: int, options: HostOptions) -> HostCost:
    """Medians of the repeats, after a run to warm up.

    Raises EngineError where texts are too short for a replay to follow another.
    """
    engine = HostEngine.of(batch, draft_tokens, options)
    prompt = (DRAFT,) * options.prompt_tokens
    requests = [
        Request(f"text-{i}", i, 0, prompt, prompt, options.new_tokens) for i in range(batch)
    ]
    costs = []
    for _ in range(options.repeats + 1):
        engine.clock.waits.clear()
        started = time.thread_time()
        done = list(engine.generate(requests))
        spent = time.thread_time() - started
        if not engine.clock.waits:
            raise EngineError("no graph was replayed twice; give more --new-tokens")
        tokens = sum(len(completion.token_ids) for completion in done)
        rounds = engine.draft_counts.rounds
        costs.append((median(engine.clock.waits), spent / rounds, spent / tokens))
    engine.close()
    medians = [1e3 * median(column) for column in zip(*costs[1:], strict=True)]
    return HostCost(batch, draft_tokens, *medians)


def run(options: HostOptions, report: Report) -> None:
    """The subcommand `host`."""
    rows = []
    for drafts in options.draft_tokens:
        for batch in options.batches:
            report.status(f"batch {batch}, {drafts} drafts")
            cost = measure(batch, drafts, options)
            report.results.append(vars(cost))
            name = f"{drafts} drafts" if drafts else "lockstep"
            rows.append((name, batch, cost.wait, cost.round, f"{1e3 * cost.token:.1f}"))
    columns = ("CPU time of the host", "batch", "copy to replay, ms", "whole round, ms")
    report.show(make_table("Rounds without a GPU", (*columns, "per token, us"), rows))
