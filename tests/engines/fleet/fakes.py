"""Workers without processes, under a clock of their own: a driver's hours are a test's seconds."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from itertools import count

from optimal_sampling.config import MixtureConfig, ToyOptions
from optimal_sampling.engines.fleet.messages import Broken, Finished, Progress, Ready, Run, Started
from optimal_sampling.engines.fleet.worker import Launcher, Worker
from optimal_sampling.types import Request, TokenTrace

EMPTY = TokenTrace.from_rows([])


@dataclass
class Behaviour:
    """What fake workers do. Times in seconds of the simulated clock."""

    capacity: int = 8
    load_seconds: float = 30.0
    request_seconds: float = 10.0
    """Mean; uniform from nothing to twice that."""
    slowness: dict[int, float] = field(default_factory=dict)
    """What the requests of some workers take, in those of the others."""
    first_round_seconds: float | None = None
    """Of an engine that counts rounds, one a second after the first; None: it counts none."""
    death_rate: float = 0.0
    """Chance per request that its worker dies at some moment of it."""
    load_failure_rate: float = 0.0
    never_loads: dict[int, Broken] = field(default_factory=dict)
    """Workers that cannot load, and what they say."""
    kills: frozenset[str] = frozenset()
    """Requests that end their worker, by id."""
    loses_events: bool = False
    """A worker dies with its machine, and tells nobody what it had begun."""
    hangs: frozenset[str] = frozenset()
    """Requests that are never finished, by id; nothing is in this worker from then on."""
    seed: int = 0


class FakeWorker(Worker):
    def __init__(self, index, launcher):
        self.name, self.device = f"worker {index}", "nowhere"
        self.index = index
        self.launcher = launcher
        self.starts = 0
        self.stop()

    def start(self):
        behaviour, rng = self.launcher.behaviour, self.launcher.rng
        self.starts += 1
        self.launcher.note_loading(+1)
        self.life = next(self.launcher.lives)
        self.is_alive, self.has_lost_events = True, False
        if self.index in behaviour.never_loads:
            self.later(1.0, "broken", behaviour.never_loads[self.index])
        elif rng.random() < behaviour.load_failure_rate:
            self.later(rng.uniform(0, behaviour.load_seconds), "die", "exit code 1")
        else:
            counts = behaviour.first_round_seconds is not None
            facts = Ready(8, 6, (0,), ("mixture",), (), counts, {})
            self.later(behaviour.load_seconds, "send", facts)

    def begin(self, run):
        self.run = run.number
        self.waiting, self.running, self.is_stuck = [], {}, False
        self.rounds = 0
        if self.launcher.behaviour.first_round_seconds is not None:
            self.later(self.launcher.behaviour.first_round_seconds, "round", run.number)

    def submit(self, run, requests):
        assert run == self.run
        self.waiting += requests.items()
        self.launcher.most_held = max(
            self.launcher.most_held, len(self.waiting) + len(self.running)
        )
        self.fill()

    def fill(self):
        behaviour, rng = self.launcher.behaviour, self.launcher.rng
        while self.waiting and len(self.running) < behaviour.capacity:
            number, request = self.waiting.pop(0)
            self.running[number] = request
            if not behaviour.loses_events:
                self.later(0.0, "send", Started(self.run, number))
            seconds = rng.uniform(0, 2 * behaviour.request_seconds)
            seconds *= behaviour.slowness.get(self.index, 1.0)
            if request.id in behaviour.hangs:
                self.is_stuck = True
            elif request.id in behaviour.kills or rng.random() < behaviour.death_rate:
                self.later(seconds, "die", "killed by SIGKILL")
            else:
                self.later(seconds, "finish", number)

    def later(self, seconds, kind, value):
        self.launcher.schedule(seconds, (self, self.life, kind, value))

    def happen(self, kind, value):
        """Take effect; whether the driver is to be told."""
        if kind == "finish" and (self.is_stuck or value not in self.running):
            return False  # of a run that was given up
        if kind == "finish":
            request = self.running.pop(value)
            tokens = (sum(map(ord, request.id)) % 100,)
            self.sent.append(Finished(self.run, value, tokens, "length", EMPTY))
            self.launcher.finished += 1
            self.fill()
        elif kind == "round":
            if self.is_stuck or value != self.run:
                return False
            self.rounds += 1
            self.sent.append(Progress(self.run, self.rounds))
            self.later(1.0, "round", value)
        elif kind == "die":
            self.is_alive, self.cause = False, value
            self.has_lost_events = self.launcher.behaviour.loses_events
        else:
            if not isinstance(value, Started):
                self.launcher.note_loading(-1)
            self.sent.append(value)
        return True

    def events(self):
        sent, self.sent = self.sent, []
        return sent

    def death(self):
        return "" if self.is_alive else self.cause

    def stop(self):
        self.life, self.is_alive, self.cause, self.sent = -1, False, "it was not started", []


class FakeLauncher(Launcher):
    def __init__(self, size, behaviour=None):
        self.size = size
        self.behaviour = behaviour or Behaviour()
        self.rng = random.Random(self.behaviour.seed)
        self.now = 0.0
        self.most_held = 0
        self.loading = self.most_loading = 0
        self.finished = 0
        self.lives = count()
        self._ticket = count()
        self._schedule = []

    def note_loading(self, change):
        self.loading += change
        self.most_loading = max(self.most_loading, self.loading)

    def worker(self, index):
        return FakeWorker(index, self)

    def clock(self):
        return self.now

    def schedule(self, seconds, what):
        heapq.heappush(self._schedule, (self.now + seconds, next(self._ticket), what))

    def wait(self, workers, seconds):
        end, news = self.now + seconds, {}
        while self._schedule and not news and self._schedule[0][0] <= end:
            self.now = moment = self._schedule[0][0]
            while self._schedule and self._schedule[0][0] <= moment + 0.01:
                _, _, (worker, life, kind, value) = heapq.heappop(self._schedule)
                if life == worker.life and worker.is_alive and worker.happen(kind, value):
                    news[worker] = None
        if not news:
            self.now = end
        return list(news)


RUN = Run(1, MixtureConfig(), "mixture", ToyOptions())


def requests(count):
    return [Request(f"prompt {i}", 0, 0, (1,), (2,), 5) for i in range(count)]
