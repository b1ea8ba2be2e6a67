"""What the driver of a fleet knows of a worker: an engine somewhere else, of any kind."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from optimal_sampling.engines.fleet.messages import Event, Run
from optimal_sampling.types import Request

__all__ = ["Launcher", "Worker"]


class Worker(ABC):
    """An engine in another process. No call waits for it, and none raises because it has died."""

    name: str
    """As it is shown, such as `worker 0`."""
    device: str
    """Where it runs, such as `GPU 3`."""
    is_waiting: bool = False
    """It was started, and waits for a place to run at: that it is not ready is no failure."""
    has_lost_events: bool = False
    """It died, and what it sent last has not arrived: it may have been running all that it held."""

    @abstractmethod
    def start(self) -> None:
        """Start loading the engine; again after `stop`. `Ready` or `Broken` is the first event."""

    @abstractmethod
    def begin(self, run: Run) -> None:
        """Give up the run before, and serve requests of this one."""

    @abstractmethod
    def submit(self, run: int, requests: Mapping[int, Request]) -> None:
        """Requests of a run by their numbers, beside those that the worker has."""

    @abstractmethod
    def events(self) -> Sequence[Event]:
        """What has arrived since the last call, completions among them."""

    @abstractmethod
    def death(self) -> str:
        """How the worker ended, such as `exit code 1`; "" while it is alive."""

    @abstractmethod
    def stop(self) -> None:
        """End the worker, with all processes that it has started. Stopping twice is safe."""

    def tidy(self) -> None:  # noqa: B027 - having nothing to tidy is a valid answer
        """Keep short what grows while it works. Called about once a second."""

    def last_words(self) -> str:
        """Last lines of its log; "" where there are none."""
        return ""


class Launcher(ABC):
    """Makes the workers of one kind, and waits for them."""

    size: int
    """Number of workers. It may change while they work, and is at least 1."""
    loads_at_once: int = 2
    """Most workers that load at once: each may need a copy of the weights in the host's memory."""

    @abstractmethod
    def worker(self, index: int) -> Worker:
        """The worker of a number, not started yet. A number is used again once it is free."""

    @abstractmethod
    def wait(self, workers: Sequence[Worker], seconds: float) -> Collection[Worker]:
        """The workers with events, or that have died; waits for the first of them."""

    def clock(self) -> float:
        """Seconds since any fixed moment."""
        return time.monotonic()

    def close(self) -> None:  # noqa: B027 - having nothing to free is a valid answer
        """Free what all workers share; they have been stopped."""
