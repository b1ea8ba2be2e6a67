"""The state of a worker as its driver sees it: what it holds, and how long it is waited for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from optimal_sampling.engines.fleet.messages import Ready
from optimal_sampling.engines.fleet.worker import Worker
from optimal_sampling.types import Request, WorkerStatus

__all__ = ["Patience", "Supervised"]

State = Literal["waiting", "starting", "ready", "retired"]


_SHOWN = {"retired": "given up"}


@dataclass(frozen=True)
class Patience:
    """How long workers are waited for, and how often they are started again."""

    timeout: float | None = None
    """Seconds without progress after which a worker hangs; None: chosen from what rounds take."""
    shortest_timeout: float = 60.0
    """Least seconds that are chosen."""
    timeout_gaps: float = 20.0
    """The longest time that was seen between two signs of progress counts this often."""
    first_round: float = 900.0
    """Seconds for the first round of a run, in which kernels may be compiled, until one is seen."""
    first_rounds: float = 5.0
    """The longest first round that was seen counts this often."""
    loading: float = 3600.0
    """Seconds for loading the models."""
    loads_at_once: int = 2
    """Most workers that load at once: each may need a copy of the weights in the host's memory."""
    failures: int = 5
    """Failures in a row, without a completion between, after which a worker is retired."""
    failures_apart: int = 12
    """The same of those with suspects, whose group was halved: 12 find four requests in a group."""
    backoff: float = 1.0
    """Seconds before the first restart; twice as many before each further one."""
    longest_backoff: float = 60.0

    def seconds_until_restart(self, failures: int) -> float:
        """After so many failures in a row."""
        return float(min(self.longest_backoff, self.backoff * 2 ** (failures - 1)))

    def is_over(self, failures: int, apart: int) -> bool:
        """Whether a worker is retired after so many failures in a row, `apart` with suspects."""
        return failures - apart >= self.failures or apart >= self.failures_apart

    def limit(self, longest_gap: float) -> float:
        """Seconds without progress after which a worker hangs."""
        if self.timeout is not None:
            return self.timeout
        return max(self.shortest_timeout, self.timeout_gaps * longest_gap)

    def first_limit(self, limit: float, longest: float | None) -> float:
        """The same before the first progress; `longest`: of those first rounds that were seen."""
        seconds = self.first_round if longest is None else self.first_rounds * longest
        return max(limit, seconds)


@dataclass(eq=False)
class Supervised:
    """A worker, and what its driver knows of it."""

    worker: Worker
    index: int = 0
    """The worker's number."""
    state: State = "waiting"
    facts: Ready | None = None
    """Of the engine, since it was loaded."""
    capacity: int = 1
    """Most requests that its engine runs at once, in the present run."""
    held: dict[int, Request] = field(default_factory=dict)
    """Requests that were submitted and are not completed, by number, in that order."""
    running: set[int] = field(default_factory=set)
    """Of these, those that the engine has taken."""
    apart: bool = False
    """What it holds are suspects."""
    warm: bool = False
    """It has made progress since its run began."""
    failures: int = 0
    """In a row."""
    failures_apart: int = 0
    """Of these, those with suspects."""
    restart_at: float = 0.0
    """By the launcher's clock."""
    heard_at: float = 0.0
    """Time of the last progress, counted in seconds that the driver has waited."""
    rounds: int = 0
    """Of its engine in this run, where it counts them."""
    tokens: int = 0
    """Tokens of its completions in this run."""
    began_at: float = 0.0
    """When it began this run, by the launcher's clock."""
    all_failures: int = 0
    """Since the fleet was opened."""
    last_failure: str = ""
    user_error: str = ""
    """Class of the error that only the user can help."""

    @property
    def room(self) -> int:
        """Requests that it may be given: what its engine runs and a refill, less what it has."""
        refill = max(1, self.capacity // 4)
        return 0 if self.apart else self.capacity + refill - len(self.held)

    @property
    def load(self) -> float:
        """Share of its engine's capacity that is taken."""
        return len(self.held) / self.capacity

    @property
    def counts_rounds(self) -> bool:
        """Whether its engine tells of its rounds."""
        return self.facts is not None and self.facts.counts_rounds

    def give(self, requests: Mapping[int, Request], *, apart: bool = False) -> None:
        """Count requests as submitted."""
        self.apart = apart
        self.held.update(requests)

    def take(self, number: int) -> Request | None:
        """A request that was completed; None where the worker was not given it."""
        self.running.discard(number)
        request = self.held.pop(number, None)
        if not self.held:
            self.apart = False
        return request

    def note_failure(self, cause: str, *, apart: bool) -> None:
        """Count a failure; `apart`: with suspects."""
        self.failures += 1
        self.failures_apart += apart
        self.all_failures += 1
        self.last_failure = cause

    def forget_failures(self) -> None:
        """Begin to count anew: it makes progress."""
        self.failures = self.failures_apart = 0

    def status(self, now: float) -> WorkerStatus:
        """As it is shown; `now` by the launcher's clock."""
        state: str = _SHOWN.get(self.state, self.state)
        if self.state == "ready":
            state = "working" if self.held else "idle"
        seconds = now - self.began_at
        return WorkerStatus(
            self.worker.name,
            self.worker.device,
            state,
            len(self.held),
            round(self.tokens / seconds, 1) if self.tokens and seconds > 0 else 0.0,
            self.all_failures,
        )

    def take_all(self) -> tuple[list[Request], list[Request]]:
        """All requests: those that were running, and the others."""
        running = [request for number, request in self.held.items() if number in self.running]
        others = [request for number, request in self.held.items() if number not in self.running]
        self.held.clear()
        self.running.clear()
        self.apart = False
        return running, others
