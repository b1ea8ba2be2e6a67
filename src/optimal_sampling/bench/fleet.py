"""A fleet of worker processes beside an ideal one, and what its driver costs per record.

The driver's costs are those of whole runs of `generate`, whose workers answer at once, with
completions that were prepared.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, get_args

import psutil

from optimal_sampling.bench.harness import (
    Report,
    Spent,
    Timings,
    interleave,
    make_table,
    per_second,
)
from optimal_sampling.bench.own_process import in_own_process
from optimal_sampling.bench.subcommands import FleetOptions
from optimal_sampling.bench.workload import ModelPair
from optimal_sampling.config import (
    DataConfig,
    FleetConfig,
    GenerateConfig,
    LocalOptions,
    MixtureConfig,
    ModelConfig,
    RunConfig,
    ToyOptions,
)
from optimal_sampling.engines.fleet import FleetEngine, open_fleet
from optimal_sampling.engines.fleet.driver import Driver
from optimal_sampling.engines.fleet.messages import (
    Event,
    Finished,
    Ready,
    Run,
    Setup,
    Submit,
    decode,
    encode,
)
from optimal_sampling.engines.fleet.process_worker import ProcessWorker
from optimal_sampling.engines.fleet.worker import Launcher, Worker
from optimal_sampling.errors import EngineError
from optimal_sampling.generate import generate
from optimal_sampling.types import TRACE_FIELDS, Completion, Mode, Request, TokenTrace
from optimal_sampling.version import __version__

__all__ = ["DriverCost", "driver_cost", "run"]

WORKER_RATE = 5000.0
"""Tokens per second of a worker, for the number of workers that one driver can feed."""
INSTANT_WORKERS = 8
SHORT = 8
"""Tokens per completion where memory is measured: of many records, none is kept."""
_NUMBER = 987654321987654321
"""Stands in a prepared message for the number of its request."""
MIB = 2**20


class InstantWorker(Worker):
    """Answers every request at once with the same completion, which was encoded before."""

    def __init__(self, index: int, tokens: int) -> None:
        self.name, self.device = f"worker {index}", "this process"
        self._events: list[bytes] = []
        rng = Random(index)
        ids = tuple(rng.randrange(40, 90) for _ in range(tokens))
        trace = TokenTrace({name: tuple(rng.random() for _ in ids) for name in TRACE_FIELDS})
        self._answer = partial(Finished, token_ids=ids, finish_reason="length", trace=trace)
        self._before, self._after = b"", b""

    def start(self) -> None:
        """As in `Worker`."""
        self._events = [encode(Ready(32, 128, (), get_args(Mode), (), False, {}))]

    def begin(self, run: Run) -> None:
        """As in `Worker`."""
        answer = encode(self._answer(run=run.number, number=_NUMBER))
        self._before, _, self._after = answer.partition(str(_NUMBER).encode())

    def submit(self, run: int, requests: Mapping[int, Request]) -> None:
        """As in `Worker`. The order is encoded, as for a process."""
        encode(Submit(run, tuple(requests.items())))
        self._events += [self._before + b"%d" % number + self._after for number in requests]

    @property
    def has_events(self) -> bool:
        """Whether anything waits for the driver."""
        return bool(self._events)

    def events(self) -> Sequence[Event]:
        """As in `Worker`."""
        events, self._events = self._events, []
        return [decode(each) for each in events]

    def death(self) -> str:
        """As in `Worker`."""
        return ""

    def stop(self) -> None:
        """As in `Worker`."""


class InstantLauncher(Launcher):
    """Workers in this process."""

    def __init__(self, size: int, tokens: int) -> None:
        self.size = size
        self._tokens = tokens

    def worker(self, index: int) -> InstantWorker:
        """As in `Launcher`."""
        return InstantWorker(index, self._tokens)

    def wait(self, workers: Sequence[Worker], seconds: float) -> Collection[Worker]:
        """As in `Launcher`."""
        ours = [worker for worker in workers if isinstance(worker, InstantWorker)]
        return [worker for worker in ours if worker.has_events]


@dataclass(frozen=True)
class DriverCost:
    """Of one run of `generate`: milliseconds per record, and memory of the process in MiB."""

    rows: int
    tokens: int
    """Of each completion."""
    cpu: float
    wall: float
    """With what waits for the disk, and for other programs."""
    before: float
    """Resident when the engine was opened, at most."""
    after: float
    """The same at the end."""

    @property
    def tokens_per_second(self) -> float:
        """What the driver can write down, by its CPU time."""
        return 1e3 * self.tokens / self.cpu


def driver_cost(rows: int, tokens: int) -> DriverCost:
    """Costs of a run of so many rows, in this process."""
    opened: list[tuple[Spent, float]] = []

    def open_with(options: Any, models: Any, mixture: Any, vocabulary: Any, mode: Any) -> Any:
        driver = Driver(InstantLauncher(INSTANT_WORKERS, tokens))
        driver.open(ready=INSTANT_WORKERS)
        setup = Setup(models, mixture, options, mode, __version__)
        opened.append((Spent.until_now(), _most_resident()))
        return FleetEngine(driver, setup, vocabulary)

    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        config = GenerateConfig(
            data=DataConfig(num_examples=rows),
            run=RunConfig(output_dir=f"{folder}/run", max_new_tokens=tokens),
            engine=ToyOptions(),
        )
        summary = generate(config, open_with=open_with)
        started, before = opened[0]
        spent = Spent.until_now(summary.tokens) - started
    per_record = 1e3 / summary.generated
    if summary.tokens != summary.generated * tokens:
        raise EngineError(f"{summary.tokens} tokens in {summary.generated} records of {tokens}")
    return DriverCost(
        rows, tokens, spent.cpu * per_record, spent.wall * per_record, before, _most_resident()
    )


def _most_resident() -> float:
    """Most memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB


def measured_costs(tasks: Sequence[tuple[int, int]]) -> Iterator[DriverCost]:
    """Costs of runs of (rows, tokens). For a process of its own."""
    for rows, tokens in tasks:
        yield driver_cost(rows, tokens)


def _lost(task: tuple[int, int], cause: str) -> DriverCost:
    raise EngineError(f"the run of {task[0]} rows: {cause}")


def speeds(options: FleetOptions, report: Report) -> Timings:
    """Fleets of several sizes on the same requests, in turn; the names are numbers of workers."""
    models = ModelConfig(device="cpu", dtype="float32")
    pair = ModelPair(models)
    report.models = pair.names
    requests = pair.workload(options.num_prompts).requests
    with ExitStack() as stack:
        fleets = {}
        for workers in options.workers:
            report.status(f"{workers} workers: loading")
            fleet = open_fleet(
                LocalOptions(batch_size=options.batch_size),
                models,
                MixtureConfig(),
                pair.vocabulary,
                fleet=FleetConfig(workers=workers),
                logs=Path(stack.enter_context(tempfile.TemporaryDirectory())),
            )
            stack.enter_context(fleet)
            fleet.driver.open(ready=workers)
            fleets[str(workers)] = fleet
        systems: dict[str, Callable[[], Spent]] = {
            name: partial(_timed, fleet, requests) for name, fleet in fleets.items()
        }
        return interleave(systems, options.repeats, report.status)


def _timed(fleet: FleetEngine, requests: Sequence[Request]) -> Spent:
    """Tokens of all completions, and the time of the driver and its workers."""
    cpu, started = _cpu_seconds(fleet), time.perf_counter()
    done: list[Completion] = list(fleet.generate(requests))
    wall = time.perf_counter() - started
    failed = [each.error for each in done if each.error]
    if failed or len(done) < len(requests):
        raise EngineError(f"{len(done)} of {len(requests)} completions; errors: {failed[:3]}")
    tokens = sum(len(each.token_ids) for each in done)
    return Spent(tokens, wall, _cpu_seconds(fleet) - cpu)


def _cpu_seconds(fleet: FleetEngine) -> float:
    """Of this process and its workers so far."""
    seconds = time.process_time()
    for member in fleet.driver.members:
        assert isinstance(member.worker, ProcessWorker)
        times = psutil.Process(member.worker.pid).cpu_times()
        seconds += times.user + times.system
    return seconds


def run(options: FleetOptions, report: Report) -> None:
    """The subcommand `fleet`."""
    timings = speeds(options, report)
    _show_speeds(options, timings, report)
    tasks = [(options.rows[0], options.record_tokens), *((rows, SHORT) for rows in options.rows)]
    costs = []
    for task in tasks:
        report.status(f"the driver alone, {task[0]} rows of {task[1]} tokens")
        costs += list(in_own_process(measured_costs, [task], _lost))
    _show_costs(costs, report)


def _show_speeds(options: FleetOptions, timings: Timings, report: Report) -> None:
    wall, cpu = per_second(timings, "wall"), per_second(timings, "cpu")
    first = str(options.workers[0])
    rows = []
    for name in timings:
        ideal = wall[first] * int(name) / options.workers[0]
        share = wall[name] / ideal
        rows.append((name, round(wall[name]), round(ideal), share, cpu[name] / cpu[first]))
        report.results.append(
            {
                "workers": int(name),
                "tokens_per_second": wall[name],
                "of_ideal": share,
                "tokens_per_cpu_second": cpu[name],
            }
        )
    columns = ("workers", "tokens/s", "ideal", "of ideal", "tokens per CPU second, of the first's")
    report.show(make_table(f"{options.num_prompts} prompts, shipped pair", columns, rows))


def _show_costs(costs: Sequence[DriverCost], report: Report) -> None:
    report.results += [vars(cost) for cost in costs]
    columns = (
        "rows x tokens",
        "CPU ms/record",
        "wall ms/record",
        "most resident, MiB",
        "of these the run",
        f"workers at {WORKER_RATE:,.0f} tokens/s",
    )
    rows = [
        (
            f"{cost.rows} x {cost.tokens}",
            cost.cpu,
            cost.wall,
            round(cost.after),
            cost.after - cost.before,
            int(cost.tokens_per_second / WORKER_RATE),
        )
        for cost in costs
    ]
    report.show(make_table("The driver alone, with workers that answer at once", columns, rows))
