"""The worker's side: loads an engine and serves the requests of one run after another.

It knows nothing of how messages travel: orders come by `deliver`, events leave by a function.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import psutil

from optimal_sampling.config import EngineOptions
from optimal_sampling.engines import Engine, open_engine
from optimal_sampling.engines.fleet.messages import (
    Begin,
    Event,
    Finished,
    Order,
    Progress,
    Ready,
    Run,
    Setup,
    Started,
    Submit,
)
from optimal_sampling.errors import ConfigError, EngineError
from optimal_sampling.records.schema import Key
from optimal_sampling.types import Request
from optimal_sampling.version import __version__
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["EngineServer"]

_GIB = 2**30
_KV_SHARE = 0.5
"""Share of a worker's memory, less its weights, that caches may take. On a CPU."""


class EngineServer:
    """An engine that serves what is delivered, until its process ends."""

    def __init__(self, setup: Setup, send: Callable[[Event], None]) -> None:
        self._setup = setup
        self._send = send
        self._inbox: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._run: Run | None = None
        self._waiting: deque[tuple[int, Request]] = deque()
        self._in_flight: dict[Key, list[int]] = {}
        """Numbers of the requests that the engine has; equal requests have one key."""
        self._engine: Engine | None = None
        self._served: tuple[int, Engine | None] = (0, None)
        """The run that is served, and its view of the engine; read from another thread."""
        self._kv_gib: float | None = None

    @property
    def progress(self) -> Progress | None:
        """How far the engine is in its run; None where it counts no rounds."""
        run, view = self._served
        rounds = view.rounds if view is not None else None
        return None if rounds is None else Progress(run, rounds)

    def deliver(self, order: Order) -> None:
        """Take an order, from any thread."""
        self._inbox.put(order)

    def load(self) -> None:
        """Load the engine and say that it is ready. Raises what loading raises."""
        setup = self._setup
        if setup.version != __version__:
            raise ConfigError(
                f"this worker has version {__version__} of optimal-sampling, and its driver "
                f"{setup.version}: install the same on both"
            )
        models, options = setup.models, setup.options
        vocabulary = Vocabulary.load(
            models.student,
            models.teacher,
            models.trust_remote_code,
            revisions=models.revisions,
            granularity=models.granularity,
        )
        fitted = self._fitted(options)
        self._engine = open_engine(fitted, models, setup.mixture, vocabulary, setup.mode)
        self._kv_gib = self._kv_budget()
        self._send(_facts(self._engine.view(options=self._fitted(options))))

    def serve(self) -> None:
        """Serve one run after another, for ever. Raises what the engine raises."""
        run: Run | None = None
        while True:
            run = self._run_after(run)
            view = self._view_for(run)
            self._served = run.number, view
            while self._run is run:
                self._serve_stream(run, view)

    def _run_after(self, before: Run | None) -> Run:
        while self._run is None or self._run is before:
            self._take(self._inbox.get())
        return self._run

    def _take(self, order: Order) -> None:
        if isinstance(order, Begin):
            self._run = order.run
            self._waiting.clear()
        elif isinstance(order, Submit) and self._run and order.run == self._run.number:
            self._waiting.extend(order.requests)

    def _view_for(self, run: Run) -> Engine:
        assert self._engine is not None
        options = self._fitted(run.options)
        return self._engine.view(run.mixture, run.mode, options, frozenset(run.capture))

    def _serve_stream(self, run: Run, view: Engine) -> None:
        """One `generate` of the engine, which may end when it has nothing to do."""
        self._in_flight.clear()
        for completion in view.generate(self._requests(run)):
            number = self._number_of(completion.request.key)
            self._send(Finished.of(run.number, number, completion))
            self._take_all()
            if self._run is not run:
                return
        if self._in_flight and self._run is run:
            raise EngineError(f"the engine ended without {len(self._in_flight)} of its requests")

    def _number_of(self, key: Key) -> int:
        """The number of a request that the engine has completed."""
        numbers = self._in_flight[key]
        number = numbers.pop(0)
        if not numbers:
            del self._in_flight[key]
        return number

    def _requests(self, run: Run) -> Iterator[Request | None]:
        """The run's requests as they come; None where the engine has some, and none waits."""
        while True:
            self._take_all()
            if not self._waiting and not self._in_flight and self._run is run:
                self._take(self._inbox.get())
            if self._run is not run:
                return
            if self._waiting:
                number, request = self._waiting.popleft()
                self._in_flight.setdefault(request.key, []).append(number)
                self._send(Started(run.number, number))
                yield request
            elif self._in_flight:
                yield None

    def _take_all(self) -> None:
        while not self._inbox.empty():
            self._take(self._inbox.get())

    # memory

    def _kv_budget(self) -> float | None:
        """GiB for caches: of this worker's share of the memory, less what the process has."""
        if self._setup.memory is None:
            return None
        used = psutil.Process().memory_info().rss
        return max(0.01, _KV_SHARE * (self._setup.memory - used) / _GIB)

    def _fitted(self, options: EngineOptions) -> EngineOptions:
        """The options with this worker's share of the memory, where caches have a budget."""
        if not hasattr(options, "kv_memory_gib"):
            return options
        given: float | None = options.kv_memory_gib
        if given is not None:
            return _with(options, kv_memory_gib=given / self._setup.sharing)
        if "kv_memory_gib" in options.fixed:
            return options  # the engine has a budget of its own
        return _with(options, kv_memory_gib=self._kv_gib)


def _with(options: EngineOptions, **changes: Any) -> EngineOptions:
    return replace(options, **changes)


def _facts(engine: Engine) -> Ready:
    return Ready(
        capacity=getattr(engine.options, "batch_size", 1),
        vocab_size=engine.vocab_size,
        stop_ids=tuple(sorted(engine.stop_ids)),
        modes=tuple(sorted(engine.modes)),
        captures=tuple(sorted(engine.captures)),
        counts_rounds=engine.rounds is not None,
        notes=engine.notes(),
    )
