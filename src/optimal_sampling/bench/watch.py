"""Drawers for measuring: they look at every round, end a run early, and emulate the acceptance of drafts."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Bool

from optimal_sampling.bench.measure import Spent
from optimal_sampling.engines.local.drafting import DraftPolicy
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.engines.local.round import RunSettings, SampledRound, Sampler
from optimal_sampling.engines.local.run import GenerationLoop
from optimal_sampling.engines.local.runner import CachedModel
from optimal_sampling.engines.local.scheduler import RoundPlan, Sequence
from optimal_sampling.engines.local.streams import to_device

__all__ = ["MeasuringEngine", "MeasuringSampler", "TimeIsUp", "Watch", "accepts"]

PROCESS = psutil.Process()


class TimeIsUp(Exception):
    """Ends a run between two rounds, when its watch says so."""


@dataclass
class Watch:
    """What is seen of a run's rounds."""

    deadline: float | None = None
    """Of `time.perf_counter`: no round starts after it."""
    rounds: int = 0
    most_rows: int = 0
    """Requests in flight at once."""
    kv_bytes: int = 0
    """Largest size of all caches together."""
    resident: int = 0
    """Largest resident memory of this process after a round, in bytes."""
    decoding: Spent = field(default_factory=Spent)
    """Rounds that read no prompt: from the start of each to the start of the next."""
    decoding_rows: int = 0
    """Rows of those rounds, summed."""
    _started: _Started | None = None

    def before(self, plan: RoundPlan, rows: list[Sequence]) -> None:
        """A round starts. Raises TimeIsUp after the deadline."""
        now = Spent(0, time.perf_counter(), time.process_time())
        if self._started is not None and self._started.decodes:
            self.decoding += self._started.until(now)
            self.decoding_rows += len(self._started.rows)
        self._started = _Started(
            now, list(rows), sum(len(s.output) for s in rows), not any(plan.chunks)
        )
        if self.deadline is not None and now.wall > self.deadline:
            raise TimeIsUp

    def after(self, models: list[CachedModel], rows: list[Sequence]) -> None:
        """Its tokens were drawn."""
        self.rounds += 1
        self.most_rows = max(self.most_rows, len(rows))
        self.kv_bytes = max(self.kv_bytes, sum(model.cache.manager.held for model in models))
        self.resident = max(self.resident, PROCESS.memory_info().rss)


@dataclass(frozen=True)
class _Started:
    """The beginning of a round."""

    at: Spent
    rows: list[Sequence]
    tokens: int
    """That the rows had drawn before it."""
    decodes: bool
    """It reads no prompt."""

    def until(self, now: Spent) -> Spent:
        return Spent(
            sum(len(s.output) for s in self.rows) - self.tokens,
            now.wall - self.at.wall,
            now.cpu - self.at.cpu,
        )


class MeasuringSampler(Sampler):
    """Draws as ever. With an `acceptance`, drafts are then accepted or rejected at that rate, whatever was drawn.

    Random weights agree on nothing, so without this a pair of shapes would reject every draft. All work of a round is
    done, and only its tokens are overwritten: a draft that is accepted by the draft itself, one that is not by the
    next id. What is accepted is a function of the request and the position.
    """

    def __init__(
        self,
        models: list[CachedModel],
        settings: RunSettings,
        policy: DraftPolicy,
        acceptance: float | None = None,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(models, settings, policy)
        assert acceptance is None or not settings.stop_ids, (
            "an overwritten token could be an end of text"
        )
        self.acceptance = acceptance
        self.watch = watch

    def sample(self, plan: RoundPlan, rows: list[Sequence]) -> SampledRound:
        """One round, as `Sampler` does it; seen by the watch."""
        if self.watch is not None:
            self.watch.before(plan, rows)
        drawn = super().sample(plan, rows)
        if self.watch is not None:
            self.watch.after(self.models, rows)
        if self.acceptance is None or drawn.width == 1:
            return drawn
        return self._emulated(drawn, rows, self.acceptance)

    def _emulated(self, drawn: SampledRound, rows: list[Sequence], rate: float) -> SampledRound:
        accepted = accepts(
            [s.request.noise_key for s in rows],
            [len(s.output) for s in rows],
            drawn.width - 1,
            rate,
        )
        tokens = drawn.step.token.view(len(rows), drawn.width).clone()
        other = (drawn.drafts + 1) % self.settings.vocab_size
        tokens[:, :-1] = torch.where(to_device(accepted, self.device), drawn.drafts, other)
        return replace(drawn, step=replace(drawn.step, token=tokens.flatten()))


class MeasuringEngine(LocalEngine):
    """An engine whose rounds are sampled by a `MeasuringSampler`."""

    acceptance: float | None = None
    watch: Watch | None = None
    loop: GenerationLoop | None = None
    """Of the latest `generate` call."""

    def _new_loop(self) -> GenerationLoop:
        self.loop = loop = super()._new_loop()
        loop.sampler = MeasuringSampler(
            loop.models, loop.settings, loop.policy, self.acceptance, self.watch
        )
        return loop


def accepts(
    keys: list[int], first: list[int], drafts: int, rate: float
) -> Bool[np.ndarray, "rows drafts"]:
    """Whether each request (64-bit key) accepts the drafts at its positions first, first + 1, ..."""
    positions = np.array(first, dtype=np.uint64)[:, None] + np.arange(drafts, dtype=np.uint64)
    uniform = _mix(_mix(np.array(keys, dtype=np.uint64))[:, None] ^ _mix(positions)) >> np.uint64(
        11
    )
    accepted: np.ndarray = uniform * 2.0**-53 < rate
    return accepted


def _mix(x: Any) -> Any:
    """MurmurHash3's finaliser: every bit of the input turns half the bits of the output."""
    shift, one, two = np.uint64(33), np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
    x = (x ^ (x >> shift)) * one
    x = (x ^ (x >> shift)) * two
    return x ^ (x >> shift)
