"""Workers that are Ray actors, on the machines of a cluster.

The driver makes a new actor for one that died; Ray restarts nothing. A worker whose actor has no
place yet waits for a machine, which may join while the run goes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimal_sampling.config import EngineOptions, FleetConfig, ModelConfig
from optimal_sampling.engines.fleet.log_file import keep_short, last_lines
from optimal_sampling.engines.fleet.messages import (
    Begin,
    Broken,
    Event,
    Order,
    Run,
    Setup,
    Submit,
    encode,
    event_of,
)
from optimal_sampling.engines.fleet.placement import (
    CPU_THREADS,
    refuse_one_gpu,
    threads,
    threads_asked_for,
)
from optimal_sampling.engines.fleet.ray_cluster import Cluster
from optimal_sampling.engines.fleet.ray_host import Host, Polled
from optimal_sampling.engines.fleet.worker import Launcher, Worker
from optimal_sampling.errors import ConfigError
from optimal_sampling.records.store import make_folder
from optimal_sampling.types import Request

__all__ = ["Need", "RayLauncher", "ray_launcher"]

_POLL_SECONDS = 10.0  # for which a machine holds back an answer that has nothing in it
_STOP_SECONDS = 2.0  # for a machine to end a worker before Ray does
_PLACE_SECONDS = 600.0  # for the cluster to have room for the first worker
_LOOK_SECONDS = 1.0  # between two looks whether the head is there
_SAY_SECONDS = 15.0  # without room before it is said
_GROUPS = {"orders": 1, "events": 1}


@dataclass(frozen=True)
class Need:
    """What Ray reserves for a worker."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        cpus = f"{self.cpus:g} CPU{'s' if self.cpus != 1 else ''}"
        gpus = f"{self.gpus:g} GPU{'s' if self.gpus != 1 else ''}"
        return f"{gpus} and {cpus}" if self.gpus else cpus

    def times(self, node: dict[str, float]) -> int:
        """How many workers fit a machine."""
        fits = node.get("CPU", 0.0) / self.cpus
        if self.gpus:
            fits = min(fits, node.get("GPU", 0.0) / self.gpus)
        return int(fits + 1e-6)


class RayWorker(Worker):
    """A worker process on some machine, behind an actor."""

    def __init__(self, index: int, launcher: RayLauncher, log: Path) -> None:
        self.name = f"worker {index}"
        self.device = "no machine yet"
        self.log = log
        self._index = index
        self._launcher = launcher
        self._ray = launcher.cluster.ray
        self._host: Any = None
        # references to results of calls, which are still to come
        self._facts: Any = None
        self._started: Any = None
        self._answer: Any = None
        self._broken: Broken | None = None
        self._death = ""

    @property
    def is_waiting(self) -> bool:  # type: ignore[override]
        """As in `Worker`: Ray has no place for its actor yet."""
        return self._facts is not None

    @property
    def awaited(self) -> list[Any]:
        """References to what Ray will answer."""
        calls = (self._facts, self._started, self._answer)
        return [each for each in calls if each is not None]

    def start(self) -> None:
        """As in `Worker`."""
        need, index = self._launcher.need, self._index
        self._broken, self._death, self.has_lost_events = None, "", False
        self.device = "no machine yet"
        actor = self._launcher.actor.options(num_cpus=need.cpus, num_gpus=need.gpus)
        self._host = actor.remote(index, need.cpus, need.gpus)
        self._facts = self._host.facts.remote()
        self._started = self._host.start.remote(encode(self._launcher.setup))
        self._poll()

    def begin(self, run: Run) -> None:
        """As in `Worker`."""
        self._send(Begin(run))

    def submit(self, run: int, requests: Mapping[int, Request]) -> None:
        """As in `Worker`."""
        self._send(Submit(run, tuple(requests.items())))

    def events(self) -> Sequence[Event]:
        """As in `Worker`."""
        if self._broken is None and not self._death:
            self._look_at_facts()
            self._started = None if self._result(self._started) else self._started
        if self._broken is not None:
            return [self._broken]
        return [] if self._death else [*self._events()]

    def death(self) -> str:
        """As in `Worker`."""
        return self._death

    def give_up(self, cause: str) -> None:
        """End the wait for a place; the next event says why."""
        self._broken = Broken(cause, ConfigError.__name__)

    def stop(self) -> None:
        """As in `Worker`."""
        host, self._host = self._host, None
        placed = host is not None and not self.is_waiting and not self._death
        self._facts = self._started = self._answer = None
        if placed:
            self._ray.wait([host.stop.remote()], timeout=_STOP_SECONDS)
        if host is not None:
            self._ray.kill(host, no_restart=True)

    def tidy(self) -> None:
        """As in `Worker`."""
        keep_short(self.log)

    def last_words(self) -> str:
        """As in `Worker`."""
        return last_lines(self.log)

    def _send(self, order: Order) -> None:
        if self._host is not None:
            call = self._host.order.options(concurrency_group="orders")
            call.remote([encode(order)])

    def _poll(self) -> None:
        call = self._host.poll.options(concurrency_group="events")
        self._answer = call.remote(_POLL_SECONDS)

    def _look_at_facts(self) -> None:
        """Learn where the worker is, once it has a place."""
        facts = self._result(self._facts)
        if facts is None:
            return
        self._facts = None
        self.device, version, python = facts
        wanted = self._launcher.setup.version
        if version != wanted:
            self._broken = Broken(
                f"{self.device} has version {version} of optimal-sampling (Python {python}), and "
                f"its driver {wanted}: install the same on both",
                ConfigError.__name__,
            )

    def _events(self) -> Iterator[Event]:
        polled: Polled | None = self._result(self._answer)
        if polled is None:
            return
        messages, self._death, log = polled
        self._answer = None
        if log:
            with self.log.open("ab") as file:
                file.write(log)
        if not self._death:
            self._poll()
        for message in messages:
            event = event_of(message)
            if isinstance(event, Broken):
                event = replace(event, cause=f"{event.cause} (on {self.device})")
            yield event

    def _result(self, reference: Any) -> Any:
        """The result of a call; None where there is none yet, or the actor has died."""
        if reference is None or self._death:
            return None
        ready, _ = self._ray.wait([reference], timeout=0)
        if not ready:
            return None
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._facts = self._started = self._answer = None
            self._lose(error)
            return None

    def _lose(self, error: Exception) -> None:
        reason = getattr(error, "cause", None)  # what a call raised, where it was that
        text = f"{type(reason).__name__}: {reason}" if reason else str(error)
        if "No module named 'optimal_sampling" in text or "has no attribute 'Host'" in text:
            self._broken = Broken(
                "a machine of the cluster does not have this version of optimal-sampling: install "
                f"{self._launcher.setup.version} on all of them ({_sentences(text)[-200:]})",
                ConfigError.__name__,
            )
            return
        self.has_lost_events = True
        self._death = f"its machine or its Ray actor was lost: {_sentences(text)[:300]}"


def _sentences(text: str) -> str:
    """Ray's message in one line, without its list of ids."""
    lines = [line.strip() for line in text.splitlines() if not line.startswith("\t")]
    return " ".join(filter(None, lines))


class RayLauncher(Launcher):
    """Workers that Ray finds places for."""

    loads_at_once = sys.maxsize  # each machine has a limit of its own

    def __init__(
        self,
        cluster: Cluster,
        need: Need,
        setup: Setup,
        logs: Path,
        count: int | None = None,
        report: Callable[[str], None] = lambda line: None,
        place_seconds: float = _PLACE_SECONDS,
    ) -> None:
        """`count`: of workers; None: as many as the cluster has places for, now and later."""
        self.cluster = cluster
        self.need = need
        self.setup = setup
        self.actor = cluster.ray.remote(
            concurrency_groups=_GROUPS, max_restarts=0, scheduling_strategy="SPREAD"
        )(Host)
        self._logs = logs
        self._count = count
        self._size = count or 1
        self._has_head, self._looked_at = True, -_LOOK_SECONDS
        self._report = report
        self._place_seconds = place_seconds
        self._without_place: float | None = None
        self._said = False
        make_folder(logs)

    @property
    def size(self) -> int:  # type: ignore[override]
        """Number of workers that the cluster has places for, or that were asked for.

        Ray counts a machine that is lost for some ten seconds more.
        """
        if self._count is None and self._has_head:
            self._size = max(1, sum(map(self.need.times, self.cluster.nodes())))
        return self._size

    def worker(self, index: int) -> RayWorker:
        """As in `Launcher`."""
        return RayWorker(index, self, self._logs / f"worker-{index}.log")

    def wait(self, workers: Sequence[Worker], seconds: float) -> Collection[Worker]:
        """As in `Launcher`."""
        self._look_for_head()
        ours = [worker for worker in workers if isinstance(worker, RayWorker)]
        awaited = {reference: worker for worker in ours for reference in worker.awaited}
        if not awaited:
            time.sleep(seconds)
            return []
        references, ray = list(awaited), self.cluster.ray
        ready, _ = ray.wait(references, num_returns=1, timeout=seconds)
        if ready:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        heard = {awaited[reference] for reference in ready}
        return heard or self._without_places(ours)

    def close(self) -> None:
        """As in `Launcher`."""
        self.cluster.close()

    def _look_for_head(self) -> None:
        """Say when the head of the cluster is gone, or back; once a second at most."""
        now = self.clock()
        if now - self._looked_at < _LOOK_SECONDS:
            return
        had, self._has_head = self._has_head, self.cluster.head_answers()
        self._looked_at = self.clock()
        if had and not self._has_head:
            self._report(
                "the head of the Ray cluster does not answer. If it stays away for a minute, Ray "
                "ends this command: what is finished is on the disk, and the same command goes on"
            )
        elif self._has_head and not had:
            self._report("the head of the Ray cluster answers again")

    def _without_places(self, workers: Sequence[RayWorker]) -> Collection[RayWorker]:
        """All workers, told to give up, where none has had a place for too long."""
        if not all(worker.is_waiting for worker in workers):
            self._without_place, self._said = None, False
            return []
        now = self.clock()
        self._without_place = self._without_place or now
        waited = now - self._without_place
        if waited > min(_SAY_SECONDS, self._place_seconds / 2) and not self._said:
            self._said = True
            self._report(
                f"waits for {self.need} on one machine, for at most {self._place_seconds:g} s; "
                f"{self._inventory()}"
            )
        if waited <= self._place_seconds:
            return []
        for worker in workers:
            worker.give_up(
                f"no machine of the Ray cluster had {self.need} for a worker within "
                f"{self._place_seconds:g} s; {self._inventory()}: add machines, or use other "
                "--gpus-per-worker"
            )
        return workers

    def _inventory(self) -> str:
        """What the cluster has."""
        total, free = self.cluster.resources(), self.cluster.ray.available_resources()
        parts = [
            f"{total.get(kind, 0):g} {kind}s, {free.get(kind, 0):g} of them free"
            for kind in ("GPU", "CPU")
        ]
        return f"the cluster has {' and '.join(parts)}"


def ray_launcher(
    setup: Setup,
    fleet: FleetConfig,
    logs: Path,
    report: Callable[[str], None] = lambda line: None,
) -> RayLauncher:
    """The launcher of the cluster that `fleet.ray` names.

    Raises ConfigError, MissingDependencyError.
    """
    assert fleet.ray is not None
    refuse_one_gpu(setup.models)
    count = None if fleet.workers in (None, "auto") else int(fleet.workers or 1)
    cluster = Cluster(fleet.ray, _local_cpus(fleet, count))
    try:
        need = _need(setup.models, setup.options, fleet, cluster, count)
        _check_sharing(need, setup.options)
        _check_precision(need, setup)
        setup = replace(setup, models=_absolute(setup.models))
        return RayLauncher(cluster, need, setup, logs, count, report)
    except BaseException:
        cluster.close()
        raise


def _local_cpus(fleet: FleetConfig, count: int | None) -> int | None:
    """CPUs of a local cluster; None: those of the machine."""
    if fleet.ray != "local" or count is None:
        return None
    return max(count, threads())


def _need(
    models: ModelConfig,
    options: EngineOptions,
    fleet: FleetConfig,
    cluster: Cluster,
    count: int | None,
) -> Need:
    """What a worker needs: whole GPUs or a part of one, or CPUs where the cluster has no GPU."""
    has_gpus = any(node.get("GPU") for node in cluster.nodes())
    asked = fleet.gpus_per_worker is not None or models.device == "cuda"
    if options.loads_models and models.device != "cpu" and (has_gpus or asked):
        each = fleet.gpus_per_worker or float(getattr(options, "tensor_parallel_size", 1))
        if each > 1 and each % 1:
            raise ConfigError(f"gpus_per_worker must be whole or below 1, got {each:g}")
        return Need(1.0, each)
    if fleet.ray == "local" and count is not None:
        return Need(float(max(1, threads() // count)), 0.0)
    largest = max((node.get("CPU", 1.0) for node in cluster.nodes()), default=1.0)
    each = float(threads_asked_for() or CPU_THREADS)
    return Need(max(1.0, min(each, largest)), 0.0)


def _check_sharing(need: Need, options: EngineOptions) -> None:
    """Raise ConfigError where workers share a GPU and each would take most of its memory."""
    if not 0 < need.gpus < 1:
        return
    names = ("kv_memory_gib", "gpu_memory_utilization")
    known = [name for name in names if hasattr(options, name)]
    if known and all(getattr(options, name) is None for name in known):
        flags = " or ".join("--" + name.replace("_", "-") for name in known)
        raise ConfigError(
            f"with gpus_per_worker {need.gpus:g} several workers share a GPU: say how much of "
            f"its memory they may take ({flags})"
        )


def _check_precision(need: Need, setup: Setup) -> None:
    """Raise ConfigError where `auto` stands for one precision here, and for another on workers.

    The records say that of this machine.
    """
    models = setup.models
    if not setup.options.loads_models or (models.dtype, models.device) != ("auto", "auto"):
        return
    import torch

    has_gpu = torch.cuda.is_available()
    if has_gpu != bool(need.gpus):
        here, there = ("a GPU", "have none") if has_gpu else ("no GPU", "have GPUs")
        raise ConfigError(
            f"this machine has {here} and the workers {there}, so that their precision differs "
            f"where it is chosen for them: use --device {'cuda' if need.gpus else 'cpu'}"
        )


def _absolute(models: ModelConfig) -> ModelConfig:
    """The models, with paths that hold in any working directory."""
    changes: dict[str, Any] = {}
    for role in ("student", "teacher"):
        path = Path(getattr(models, role))
        with contextlib.suppress(OSError):
            if path.is_dir():
                changes[role] = str(path.absolute())
    return replace(models, **changes)
