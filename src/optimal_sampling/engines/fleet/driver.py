"""The driver of a fleet: hands requests to workers as they have room, and takes completions.

It knows workers by `worker.Worker` alone. Requests of a worker that died go to the front of the
queue, or to the suspects; the worker is started again.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice

from optimal_sampling import errors
from optimal_sampling.engines.fleet.messages import (
    Broken,
    Event,
    Finished,
    Progress,
    Ready,
    Run,
    Started,
)
from optimal_sampling.engines.fleet.supervision import Patience, Supervised
from optimal_sampling.engines.fleet.suspects import Suspects
from optimal_sampling.engines.fleet.worker import Launcher, Worker
from optimal_sampling.errors import EngineError, OptimalSamplingError
from optimal_sampling.types import Completion, Request, WorkerStatus

__all__ = ["Driver"]

_TICK = 1.0  # most seconds between two looks at the clock
_MOST_BLAMED = 5  # requests in a row, after which something else is to blame


class Driver:
    """All workers of a fleet. Single-threaded: it works while its completions are asked for."""

    def __init__(
        self,
        launcher: Launcher,
        patience: Patience | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.launcher = launcher
        self.patience = patience or Patience()
        self.report = report
        """Called with a line about each worker that fails."""
        self.on_tick: Callable[[], None] = lambda: None
        """Called about once a second."""
        self.members: list[Supervised] = []
        self._of: dict[Worker, Supervised] = {}
        self._fit_members()
        self.longest_gap = 0.0
        """Longest time between two signs of progress of a worker, in seconds."""
        self.longest_first: float | None = None
        """Longest time to the first progress of a run."""
        self._run: Run | None = None
        self._returned: deque[Request] = deque()
        self._suspects = Suspects()
        self._finished: deque[Completion] = deque()
        self._numbers = count()
        self._held = 0
        self._hungry: dict[Supervised, None] = {}
        """Workers that may have room, as an ordered set."""
        self._waited = 0.0
        self._ticked = 0.0
        self._blamed = 0
        self._last_blame = ""

    def _fit_members(self) -> None:
        """As many members as the launcher has places for.

        Where it has fewer than before, those that wait for a place are dropped.
        """
        surplus = len(self.members) - self.launcher.size
        homeless = [each for each in self.members if each.worker.is_waiting]
        for member in homeless[::-1][: max(0, surplus)]:
            member.worker.stop()
            self.members.remove(member)
            del self._of[member.worker]
        used = {each.index for each in self.members}
        free = (index for index in count() if index not in used)
        for index in islice(free, max(0, -surplus)):
            member = Supervised(self.launcher.worker(index), index)
            self.members.append(member)
            self._of[member.worker] = member

    # a run

    def open(self, ready: int = 1) -> None:
        """Start the workers and wait until so many are ready.

        Raises what `generate` raises where none can be started.
        """
        while sum(each.state == "ready" for each in self.members) < ready:
            self._turn()
            if all(each.state in ("ready", "retired") for each in self.members):
                return

    def generate(self, run: Run, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Serve the requests of a run.

        A completion counts as taken when the next one is asked for. Raises EngineError, or the
        UserError of the last worker, where no worker is left.
        """
        source = _Source(requests)
        self._begin(run)
        try:
            while True:
                while self._finished:
                    yield self._finished.popleft()
                self._feed(source)
                if self._finished:
                    continue
                if source.is_exhausted and not (self._held or self._returned or self._suspects):
                    return
                self._turn()
        finally:
            self._give_up()

    def status(self) -> list[WorkerStatus]:
        """All workers, as they are shown."""
        now = self.launcher.clock()
        return [member.status(now) for member in self.members]

    def close(self) -> None:
        """Stop all workers."""
        for member in self.members:
            member.worker.stop()
            member.take_all()
            if member.state != "retired":
                member.state = "waiting"
        self.launcher.close()

    def _begin(self, run: Run) -> None:
        self._run = run
        for member in self.members:
            if member.state == "ready":
                self._begin_on(member)

    def _begin_on(self, member: Supervised) -> None:
        if self._run is None or member.facts is None:
            return
        member.warm, member.tokens, member.rounds = False, 0, 0
        member.began_at = self.launcher.clock()
        member.capacity = getattr(self._run.options, "batch_size", member.facts.capacity)
        member.worker.begin(self._run)
        self._hungry[member] = None

    def _give_up(self) -> None:
        """Forget the run; workers that are still at it drop it when the next one begins."""
        self._run = None
        self._returned.clear()
        self._suspects.drop()
        self._finished.clear()
        self._hungry.clear()
        self._held = 0
        for member in self.members:
            member.take_all()

    # requests to workers

    def _feed(self, source: _Source) -> None:
        """Give work to the workers that have room, the emptiest first."""
        if source.is_exhausted and not (self._returned or self._suspects):
            return
        given: dict[Supervised, dict[int, Request]] = {}
        waiting = [(each.load, place, each) for place, each in enumerate(self._hungry)]
        heapq.heapify(waiting)
        while waiting:
            _, place, member = waiting[0]
            if not member.held and self._give_suspects(member):
                heapq.heappop(waiting)
            elif member.room <= 0:
                heapq.heappop(waiting)
                self._hungry.pop(member, None)
            elif (request := self._next_request(source)) is None:
                break
            else:
                numbered = self._numbered([request])
                member.give(numbered)
                given.setdefault(member, {}).update(numbered)
                heapq.heapreplace(waiting, (member.load, place, member))
        for member, requests in given.items():
            self._submit(member, requests)

    def _give_suspects(self, member: Supervised) -> bool:
        group = self._numbered(self._suspects.next_group())
        if not group:
            return False
        member.give(group, apart=True)
        self._hungry.pop(member, None)
        self._submit(member, group)
        return True

    def _numbered(self, requests: Sequence[Request]) -> dict[int, Request]:
        """Requests that a worker will hold, each under a number of its own."""
        self._held += len(requests)
        return {next(self._numbers): request for request in requests}

    def _submit(self, member: Supervised, requests: Mapping[int, Request]) -> None:
        assert self._run is not None
        if len(member.held) == len(requests):  # it was idle until now
            member.heard_at = self._waited
        member.worker.submit(self._run.number, requests)

    def _next_request(self, source: _Source) -> Request | None:
        return self._returned.popleft() if self._returned else source.next()

    # events of workers

    def _turn(self) -> None:
        """Start workers that are due, and wait for what the others have to say."""
        self._start_due()
        alive = [each.worker for each in self.members if each.state in ("starting", "ready")]
        before = self.launcher.clock()
        asked = self._seconds_until_due(before)
        news = self.launcher.wait(alive, asked)
        # A paused driver (Ctrl-Z) returns late, and its workers were not slow meanwhile.
        self._waited += min(self.launcher.clock() - before, asked + _TICK)
        for worker in news:
            self._hear(self._of[worker])
        if self._waited - self._ticked >= _TICK:
            self._ticked = self._waited
            self._look_at_all()
            self._check_progress()
            self._fit_members()
            self.on_tick()
        self._check_sense()

    def _start_due(self) -> None:
        now = self.launcher.clock()
        starting = [each for each in self.members if each.state == "starting"]
        loading = sum(not each.worker.is_waiting for each in starting)
        for member in self.members:
            if loading >= self.patience.loads_at_once:
                return
            if member.state == "waiting" and member.restart_at <= now:
                member.state = "starting"
                member.heard_at = self._waited
                member.worker.start()
                loading += not member.worker.is_waiting

    def _seconds_until_due(self, now: float) -> float:
        """Until a worker may be started, or the next tick."""
        if sum(each.state == "starting" for each in self.members) >= self.patience.loads_at_once:
            return _TICK
        due = [each.restart_at - now for each in self.members if each.state == "waiting"]
        return max(0.01, min([_TICK, *due]))

    def _hear(self, member: Supervised) -> None:
        """Take what a worker has sent; then see whether it has died."""
        cause = ""
        for event in member.worker.events():
            if isinstance(event, Broken):
                cause, member.user_error = event.cause, event.kind
            else:
                self._take(member, event)
        cause = cause or member.worker.death()
        if cause:
            self._lose(member, cause)

    def _take(self, member: Supervised, event: Event) -> None:
        if isinstance(event, Ready):
            member.state, member.facts = "ready", event
            member.heard_at = self._waited
            self._begin_on(member)
        elif self._run is None or event.run != self._run.number:  # type: ignore[union-attr]
            return
        elif isinstance(event, Progress):
            if event.rounds > member.rounds:
                self._note_progress(member)
            member.rounds = event.rounds
        elif isinstance(event, Started):
            member.running.add(event.number)
            if not member.counts_rounds and self._knows_timeout:
                self._note_progress(member)  # its completions are all that will be seen of it
        elif isinstance(event, Finished):
            self._note_progress(member)
            self._complete(member, event)

    @property
    def _knows_timeout(self) -> bool:
        return self.patience.timeout is not None or self.longest_gap > 0

    def _note_progress(self, member: Supervised) -> None:
        gap = self._waited - member.heard_at
        if member.held and (member.warm or not member.counts_rounds):
            self.longest_gap = max(self.longest_gap, gap)
        elif member.held:
            self.longest_first = max(self.longest_first or 0.0, gap)
        member.warm = True
        member.heard_at = self._waited

    def _complete(self, member: Supervised, event: Finished) -> None:
        request = member.take(event.number)
        if request is None:
            return
        self._held -= 1
        self._hungry[member] = None
        self._suspects.clear(request)
        member.forget_failures()
        self._blamed = 0
        member.tokens += len(event.token_ids)
        self._finished.append(event.completion(request))

    # failures

    def _look_at_all(self) -> None:
        """Find workers that have ended without a sign of it."""
        for member in self.members:
            if member.state in ("starting", "ready"):
                self._hear(member)
                member.worker.tidy()

    def _check_progress(self) -> None:
        """Take workers that hang for dead."""
        limit = self.patience.limit(self.longest_gap)
        first_limit = self.patience.first_limit(limit, self.longest_first)
        for member in self.members:
            if member.worker.is_waiting:
                member.heard_at = self._waited
            silent = self._waited - member.heard_at
            if member.state == "starting" and silent > self.patience.loading:
                self._lose(member, f"it was not ready after {silent:.0f} s")
            elif member.state == "ready" and member.held:
                allowed = limit if member.warm else first_limit
                if silent > allowed:
                    self._lose(member, f"no progress for {allowed:.0f} s")

    def _lose(self, member: Supervised, cause: str) -> None:
        """Hand the requests of a dead worker to others, and have it started again."""
        member.worker.stop()
        if member.worker.has_lost_events:
            member.running.update(member.held)
        apart = member.apart
        running, others = member.take_all()
        self._held -= len(running) + len(others)
        self._hungry.pop(member, None)
        blamed = self._suspects.after_death(running, apart=apart)
        if apart:
            self._suspects.hand_back(others)
        else:
            self._returned.extendleft(reversed(others))
        member.note_failure(cause, apart=apart)
        if blamed is not None:
            self._blame(blamed, cause)
            member.forget_failures()
        self._restart_or_retire(member)

    def _blame(self, request: Request, cause: str) -> None:
        self._blamed += 1
        self._last_blame = cause
        self._finished.append(
            Completion.failed(request, f"this request ended its worker, also alone: {cause}")
        )

    def _restart_or_retire(self, member: Supervised) -> None:
        name, cause = _title(member), member.last_failure
        if member.user_error or self.patience.is_over(member.failures, member.failures_apart):
            member.state = "retired"
            words = member.worker.last_words()
            self.report(
                f"{name} is given up after {member.failures} failures in a row: {cause}"
                + (f"\n{words}" if words else "")
            )
            return
        seconds = self.patience.seconds_until_restart(max(1, member.failures))
        member.state = "waiting"
        member.restart_at = self.launcher.clock() + seconds
        self.report(f"{name} failed: {cause}; it is started again in {seconds:g} s")

    def _check_sense(self) -> None:
        """Raise where going on makes no sense, once all completions are handed out."""
        if self._finished:
            return
        if self._blamed >= _MOST_BLAMED:
            raise EngineError(
                f"{self._blamed} requests in a row each ended the worker that ran it alone, and "
                f"none was completed between them: {self._last_blame}"
            )
        if all(each.state == "retired" for each in self.members):
            raise self._end_of_all()

    def _end_of_all(self) -> OptimalSamplingError:
        last = self.members[-1]
        kind = getattr(errors, last.user_error, None) if last.user_error else None
        causes = {each.last_failure: each for each in self.members}
        if kind is not None and len(causes) == 1:
            error: OptimalSamplingError = kind(last.last_failure)
            return error
        lines = [f"  {_title(member)}: {cause}" for cause, member in causes.items()]
        words = last.worker.last_words()
        return EngineError("\n".join(["no worker is left:", *lines, words]).rstrip())


def _title(member: Supervised) -> str:
    return f"{member.worker.name} ({member.worker.device})"


class _Source:
    """Requests, pulled one by one."""

    def __init__(self, requests: Iterable[Request | None]) -> None:
        self._requests = iter(requests)
        self.is_exhausted = False

    def next(self) -> Request | None:
        """The next request; None where there is none now, or none any more."""
        if self.is_exhausted:
            return None
        try:
            return next(self._requests)
        except StopIteration:
            self.is_exhausted = True
            return None
