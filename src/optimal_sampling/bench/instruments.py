"""What is recorded of the local engine's rounds, and the emulated acceptance of drafts.

The only file of the benchmarks that depends on how the engine's generation loop is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import psutil
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from optimal_sampling.bench.harness import Spent
from optimal_sampling.distribution import gumbel, keys_tensor
from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.local.engine import LocalEngine
from optimal_sampling.engines.local.round import SampledRound, Sampler
from optimal_sampling.engines.local.run import GenerationLoop
from optimal_sampling.engines.local.scheduler import RoundPlan, Sequence
from optimal_sampling.errors import EngineError
from optimal_sampling.types import Request

__all__ = ["AcceptedDrafts", "MeasuredEngine", "Recorder", "resident_bytes"]


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


class OutOfTime(Exception):
    """Ends a run between two rounds."""


@dataclass
class Recorder:
    """What happens in the rounds of one `generate` call."""

    loop: GenerationLoop
    stop: Callable[[int], bool]
    """Whether the run ends after this many rounds, before the texts do."""
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
    decoding_rounds: int = 0
    """How many those are."""
    whole: Spent = field(default_factory=Spent)
    """The call, with the tokens of texts that did not end."""
    lengths: dict[str, int] = field(default_factory=dict)
    """Tokens of the texts that ended, by request id."""
    _started: Spent | None = None
    """Start of the round in progress, where it reads no prompt, and the tokens of its rows."""
    _rows: list[Sequence] = field(default_factory=list)

    def before(self, plan: RoundPlan, rows: list[Sequence]) -> None:
        """Record the start of a round. Raises OutOfTime where the run is to end."""
        if self._started is not None:
            self.decoding += _drawn(self._rows) - self._started
            self.decoding_rows += len(self._rows)
            self.decoding_rounds += 1
        self._rows = list(rows)
        self._started = None if any(plan.chunks) else _drawn(rows)
        if self.stop(self.rounds):
            raise OutOfTime

    def after(self, rows: list[Sequence]) -> None:
        """Record the end of a round, before its tokens are appended."""
        self.rounds += 1
        self.most_rows = max(self.most_rows, len(rows))
        self.kv_bytes = max(self.kv_bytes, self.loop.memory.held)
        self.resident = max(self.resident, resident_bytes())

    def drafts(self) -> dict[str, float]:
        """Share of drafted tokens that was accepted, and tokens per row and round."""
        counts = self.loop.counts
        return {
            "accepted": counts.accepted / counts.drafted,
            "tokens_per_round": self.decoding.tokens / self.decoding_rows,
        }

    def tokens(self) -> int:
        """Drawn so far."""
        scheduler = self.loop.scheduler
        lengths = dict(self.lengths)
        for sequence in (*scheduler.running, *scheduler.waiting):
            lengths.setdefault(sequence.request.id, len(sequence.output))
        return sum(lengths.values())


def _drawn(rows: list[Sequence]) -> Spent:
    return Spent.until_now(sum(len(sequence.output) for sequence in rows))


class MeasuredEngine(LocalEngine):
    """A local engine that records its rounds, and emulates the acceptance of drafts.

    Random weights agree on nothing, so without emulation every draft would be rejected.
    """

    recorder: Recorder
    """Of the latest `generate` call."""
    stop: Callable[[int], bool] = staticmethod(lambda rounds: False)
    """Whether a run ends after this many rounds, before the texts do."""
    acceptance: float | None = None
    """Share of drafts that is accepted."""

    def record(self, requests: Iterable[Request]) -> Recorder:
        """Draw the texts, or as much as `stop` allows. Raises EngineError where one fails."""
        started = Spent.until_now()
        with contextlib.suppress(OutOfTime):
            for completion in self.generate(requests):
                if completion.error:
                    raise EngineError(completion.error)
                self.recorder.lengths[completion.request.id] = len(completion.token_ids)
        recorder = self.recorder
        recorder.whole = Spent.until_now(recorder.tokens()) - started
        return recorder

    def _new_loop(self) -> GenerationLoop:
        loop = super()._new_loop()
        self.recorder = Recorder(loop, self.stop)
        # an overwritten token could be an end of text
        assert self.acceptance is None or not self.stop_ids
        sampler = MeasuredSampler(loop.models, loop.settings, loop.policy)
        sampler.recorder = self.recorder
        if self.acceptance is not None:
            sampler.accepted = AcceptedDrafts(self.acceptance, sampler.device)
        loop.sampler = sampler
        return loop


class MeasuredSampler(Sampler):
    """Samples as usual; then, with an `acceptance`, overwrites which drafts were accepted.

    All work of a round is done, and only its tokens change: an accepted position takes the
    draft itself, a rejected one the next id.
    """

    recorder: Recorder
    accepted: AcceptedDrafts | None = None

    def sample(
        self, plan: RoundPlan, rows: list[Sequence], before: SampledRound | None = None
    ) -> SampledRound:
        """One round. Raises OutOfTime where the run is to end."""
        self.recorder.before(plan, rows)
        sampled = super().sample(plan, rows, before)
        self.recorder.after(rows)
        if self.accepted is not None and sampled.width > 1:
            self._overwrite(sampled, rows, self.accepted)
        return sampled

    def _overwrite(self, sampled: SampledRound, rows: list[Sequence], rule: AcceptedDrafts) -> None:
        drafts, width = sampled.drafts, sampled.width
        positions = sampled.noise.positions(width)[:, :-1]
        accepted = rule.at([row.noise_key for row in rows], positions)
        tokens = sampled.step.token.view(-1, width)
        tokens[:, :-1] = torch.where(accepted, drafts, (drafts + 1) % self.settings.vocab_size)


class AcceptedDrafts:
    """Which drafts are accepted, as a function of the request and of the position alone.

    The answers lie on the device, so that asking costs a GPU neither a wait nor much time. They
    repeat after PERIOD positions.
    """

    PERIOD = 1024

    def __init__(self, rate: float, device: torch.device) -> None:
        self.rate = rate
        self._device = device
        self._places: dict[int, int] = {}
        """Row of the table, by the 64-bit key of a request's noise."""
        self._table = torch.empty(0, self.PERIOD, dtype=torch.bool, device=device)

    def at(
        self, keys: list[int], positions: Int64[Tensor, "rows drafts"]
    ) -> Bool[Tensor, "rows drafts"]:
        """Whether the drafts of these requests at these positions of their texts are accepted."""
        self._add([key for key in dict.fromkeys(keys) if key not in self._places])
        places = to_device(np.array([self._places[key] for key in keys]), self._device)
        return self._table[places[:, None], positions % self.PERIOD]

    def _add(self, keys: list[int]) -> None:
        """Extend the table. P(Gumbel < -log(-log(rate))) = rate."""
        if not keys:
            return
        self._places |= {key: len(self._places) + i for i, key in enumerate(keys)}
        every_key = keys_tensor(keys).repeat_interleave(self.PERIOD)
        noise = gumbel(every_key, torch.arange(self.PERIOD).repeat(len(keys)), 1)
        threshold = -torch.log(-torch.tensor(self.rate).log())
        accepted = (noise < threshold).view(len(keys), self.PERIOD)
        self._table = torch.cat([self._table, to_device(accepted.numpy(), self._device)])
