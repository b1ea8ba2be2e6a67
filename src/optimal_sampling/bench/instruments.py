"""What is recorded of the local engine's rounds, and the emulated acceptance of drafts.

The only file of the benchmarks that depends on how the engine's generation loop is made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch
from jaxtyping import Bool

from optimal_sampling.bench.harness import Spent
from optimal_sampling.engines.local.drafting import DraftPolicy
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.engines.local.round import RunSettings, SampledRound, Sampler
from optimal_sampling.engines.local.run import GenerationLoop
from optimal_sampling.engines.local.runner import CachedModel
from optimal_sampling.engines.local.scheduler import RoundPlan, Sequence
from optimal_sampling.engines.local.streams import to_device

__all__ = ["MeasuredEngine", "OutOfTime", "Recorder", "accepts"]

PROCESS = psutil.Process()


class OutOfTime(Exception):
    """Ends a run between two rounds, at the limits of its recorder."""


@dataclass
class Recorder:
    """What happens in the rounds of one `generate` call."""

    deadline: float = float("inf")
    """Value of `time.perf_counter` after which no round starts."""
    most_rounds: int | None = None
    """Number of rounds after which none starts."""
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
    loop: GenerationLoop = field(init=False)
    """The generation loop of the call."""
    _started: _Started | None = None

    def before(self, plan: RoundPlan, rows: list[Sequence]) -> None:
        """Record the start of a round. Raises OutOfTime beyond the limits."""
        now = Spent(0, time.perf_counter(), time.process_time())
        if self._started is not None and self._started.decodes:
            self.decoding += self._started.until(now)
            self.decoding_rows += len(self._started.rows)
        decodes = not any(plan.chunks)
        self._started = _Started(now, list(rows), _drawn_tokens(rows), decodes)
        if now.wall > self.deadline or self.rounds == self.most_rounds:
            raise OutOfTime

    def after(self, rows: list[Sequence]) -> None:
        """Record the end of a round, before its tokens are appended."""
        self.rounds += 1
        self.most_rows = max(self.most_rows, len(rows))
        self.kv_bytes = max(self.kv_bytes, self.loop.memory.held)
        self.resident = max(self.resident, PROCESS.memory_info().rss)

    def unfinished(self) -> dict[str, int]:
        """Tokens drawn so far, by request id, of the texts that are still in the scheduler."""
        scheduler = self.loop.scheduler
        return {s.request.id: len(s.output) for s in (*scheduler.running, *scheduler.waiting)}


@dataclass(frozen=True)
class _Started:
    """The start of a round."""

    at: Spent
    rows: list[Sequence]
    tokens: int
    """Drawn by these rows before the round."""
    decodes: bool
    """The round reads no prompt."""

    def until(self, now: Spent) -> Spent:
        tokens = _drawn_tokens(self.rows) - self.tokens
        return Spent(tokens, now.wall - self.at.wall, now.cpu - self.at.cpu)


def _drawn_tokens(rows: list[Sequence]) -> int:
    return sum(len(sequence.output) for sequence in rows)


class MeasuredEngine(LocalEngine):
    """A local engine that records its rounds, and emulates the acceptance of drafts.

    Random weights agree on nothing, so without emulation every draft would be rejected.
    """

    recorder: Recorder
    acceptance: float | None = None
    """Share of drafts that is accepted."""

    def _new_loop(self) -> GenerationLoop:
        loop = super()._new_loop()
        loop.sampler = MeasuredSampler(
            loop.models, loop.settings, loop.policy, self.recorder, self.acceptance
        )
        self.recorder.loop = loop
        return loop


class MeasuredSampler(Sampler):
    """Samples as usual; then, with an `acceptance`, overwrites which drafts were accepted.

    All work of a round is done, and only its tokens change: an accepted position takes the
    draft itself, a rejected one the next id. Acceptance is a function of the request and the
    position.
    """

    def __init__(
        self,
        models: list[CachedModel],
        settings: RunSettings,
        policy: DraftPolicy,
        recorder: Recorder,
        acceptance: float | None,
    ) -> None:
        super().__init__(models, settings, policy)
        # an overwritten token could be an end of text
        assert acceptance is None or not settings.stop_ids
        self.recorder = recorder
        self.acceptance = acceptance

    def sample(self, plan: RoundPlan, rows: list[Sequence]) -> SampledRound:
        """One round. Raises OutOfTime at the recorder's limits."""
        self.recorder.before(plan, rows)
        sampled = super().sample(plan, rows)
        self.recorder.after(rows)
        if self.acceptance is None or sampled.width == 1:
            return sampled
        return self._emulated(sampled, rows, self.acceptance)

    def _emulated(self, sampled: SampledRound, rows: list[Sequence], rate: float) -> SampledRound:
        keys = [s.request.noise_key for s in rows]
        positions = [len(s.output) for s in rows]
        accepted = accepts(keys, positions, sampled.width - 1, rate)
        tokens = sampled.step.token.view(len(rows), sampled.width).clone()
        other = (sampled.drafts + 1) % self.settings.vocab_size
        tokens[:, :-1] = torch.where(to_device(accepted, self.device), sampled.drafts, other)
        return replace(sampled, step=replace(sampled.step, token=tokens.flatten()))


def accepts(
    keys: list[int], first: list[int], drafts: int, rate: float
) -> Bool[np.ndarray, "rows drafts"]:
    """Whether each request (64-bit key) accepts its drafts from position `first` on."""
    positions = np.array(first, dtype=np.uint64)[:, None] + np.arange(drafts, dtype=np.uint64)
    hashed = _mix(_mix(np.array(keys, dtype=np.uint64))[:, None] ^ _mix(positions))
    uniform = (hashed >> np.uint64(11)) * 2.0**-53
    accepted: np.ndarray = uniform < rate
    return accepted


def _mix(x: Any) -> Any:
    """MurmurHash3's finaliser, fmix64, of uint64 arrays."""
    shift, one, two = np.uint64(33), np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
    x = (x ^ (x >> shift)) * one
    x = (x ^ (x >> shift)) * two
    return x ^ (x >> shift)
