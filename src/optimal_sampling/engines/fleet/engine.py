"""`FleetEngine`: an engine whose workers are engines."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import cast

from optimal_sampling.config import (
    EngineOptions,
    FleetConfig,
    MixtureConfig,
    ModelConfig,
)
from optimal_sampling.engines.base import Engine
from optimal_sampling.engines.fleet.driver import Driver
from optimal_sampling.engines.fleet.messages import Ready, Run, Setup
from optimal_sampling.engines.fleet.placement import places
from optimal_sampling.engines.fleet.process_worker import ProcessLauncher
from optimal_sampling.engines.fleet.supervision import Patience
from optimal_sampling.engines.fleet.worker import Launcher
from optimal_sampling.errors import EngineError
from optimal_sampling.types import Completion, Mode, Request, WorkerStatus
from optimal_sampling.version import __version__
from optimal_sampling.vocabulary import Vocabulary, fetch_model

__all__ = ["FleetEngine", "open_fleet"]


class FleetEngine(Engine):
    """Many engines as one. Views share the workers."""

    modes: frozenset[Mode]  # type: ignore[misc]  # those of the workers' engines
    captures: frozenset[str]  # type: ignore[misc]

    def __init__(
        self,
        driver: Driver,
        setup: Setup,
        vocabulary: Vocabulary | None = None,
        temporary: Path | None = None,
    ) -> None:
        """`driver`: opened, so that at least one worker is ready.

        `temporary`: folder of logs that goes when the fleet is closed, unless a worker failed.
        """
        facts = _first_facts(driver)
        self.driver = driver
        self.mixture = setup.mixture
        self.mode = setup.mode
        self.options = setup.options
        self.vocabulary = vocabulary
        self.modes = frozenset(facts.modes)
        self.captures = frozenset(facts.captures)
        self.vocab_size = facts.vocab_size
        self.stop_ids = frozenset(facts.stop_ids)
        self._numbers = count(1)
        self._temporary = temporary
        self._is_closed: list[bool] = []

    def generate(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """As in `Engine`."""
        if self._is_closed:
            raise EngineError("this engine was closed; open another one")
        capture = tuple(sorted(self.capture))
        run = Run(next(self._numbers), self.mixture, self.mode, self.options, capture)
        yield from self.driver.generate(run, requests)

    def workers(self) -> list[WorkerStatus]:
        """As in `Engine`."""
        return self.driver.status()

    def watch(self, tick: Callable[[], None]) -> None:
        """As in `Engine`."""
        self.driver.on_tick = tick

    def notes(self) -> dict[str, str]:
        """The workers, and the notes of the first one's engine."""
        devices = [member.worker.device for member in self.driver.members]
        listed = "; ".join(f"{devices.count(each)} on {each}" for each in dict.fromkeys(devices))
        return {"workers": f"{len(devices)} ({listed})", **_first_facts(self.driver).notes}

    def close(self) -> None:
        """Stop the workers."""
        self._is_closed.append(True)
        _close(self.driver, self._temporary)


def _close(driver: Driver | None, temporary: Path | None) -> None:
    """Stop the workers, and remove their logs from a temporary folder if none of them failed."""
    if driver is not None:
        driver.close()
    failures = [each.all_failures for each in driver.members] if driver is not None else []
    if temporary is not None and not any(failures):
        shutil.rmtree(temporary, ignore_errors=True)


def _first_facts(driver: Driver) -> Ready:
    known = [member.facts for member in driver.members if member.facts is not None]
    if not known:
        raise EngineError("no worker has loaded its engine")
    return known[0]


def open_fleet(
    options: EngineOptions,
    models: ModelConfig,
    mixture: MixtureConfig,
    vocabulary: Vocabulary,
    mode: Mode = "mixture",
    *,
    fleet: FleetConfig,
    logs: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> FleetEngine:
    """A fleet of engines that the options belong to, the first of them loaded.

    `logs`: folder of the workers' log files; None: a temporary one. `report` is called with lines
    about workers that fail. Raises ConfigError, and what loading the engine raises.
    """
    setup = Setup(models, mixture, options, mode, __version__)
    temporary = Path(tempfile.mkdtemp(prefix="fleet-")) if logs is None else None
    driver: Driver | None = None
    try:
        launcher = _launcher(setup, fleet, logs or cast(Path, temporary), report)
        patience = Patience(timeout=fleet.worker_timeout, loads_at_once=launcher.loads_at_once)
        driver = Driver(launcher, patience, report)
        if options.loads_models and not fleet.has_other_machines:
            for role in ("student", "teacher") if mode == "mixture" else (mode,):
                fetch_model(getattr(models, role), getattr(models, f"{role}_revision"))
        driver.open()
        return FleetEngine(driver, setup, vocabulary, temporary)
    except BaseException:
        _close(driver, temporary)
        raise


def _launcher(
    setup: Setup, fleet: FleetConfig, logs: Path, report: Callable[[str], None]
) -> Launcher:
    """The launcher of the kind of workers that is asked for."""
    if fleet.ray is not None:
        from optimal_sampling.engines.fleet.ray_worker import ray_launcher

        return ray_launcher(setup, fleet, logs, report)
    return ProcessLauncher(places(fleet, setup.models, setup.options), setup, logs)
