"""Engines in processes of their own, timed in turn; medians, ratios and tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Literal

from rich.console import Console

from engines import Setup
from optimal_sampling.bench.harness import Spent, Systems, interleave, make_table

__all__ = ["Work", "measure", "ratios", "report"]

Clock = Literal["wall", "cpu"]
Work = tuple[int, int]
"""Sequences at once, and new tokens of each."""
Times = dict[str, dict[Work, list[Spent]]]
"""Counted repeats by engine and work."""

WARM_UP_TOKENS = 8
"""New tokens of the repeats that do not count, and of those of an engine too slow for more."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class Worker:
    """One engine in its process."""

    def __init__(self, setup: Setup, process: subprocess.Popen[str], log: Path) -> None:
        self.setup, self.process, self.log = setup, process, log
        self._answer("READY")

    def run(self, work: Work, repeat: int, trace: str) -> Spent:
        """Tokens of all sequences, and the seconds they took."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{work[0]} {work[1]} {repeat} {trace}\n")
        self.process.stdin.flush()
        return Spent(**json.loads(self._answer("DONE")))

    def systems(self, work: Work) -> Systems:
        """What is timed of this engine: lockstep with and without alpha statistics."""
        name = self.setup.engine
        rows = {name: self._system(work, "off")}
        if name == "lockstep":
            rows["lockstep + alpha"] = self._system(work, "alpha")
        return rows

    def _system(self, work: Work, trace: str) -> Callable[[], Spent]:
        batch, new = work
        repeats = count()

        def run() -> Spent:
            repeat = next(repeats)
            short = repeat == 0 or self.setup.engine == "nested"
            return self.run((batch, min(WARM_UP_TOKENS, new) if short else new), repeat, trace)

        return run

    def _answer(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :]
        raise RuntimeError(f"{self.setup.engine} ended:\n{self.log.read_text()[-3000:]}")


@contextmanager
def opened(setup: Setup) -> Iterator[Worker]:
    """An engine in a process of its own, ended on the way out."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("engines.py")), setup.line()],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield Worker(setup, process, Path(folder) / "log")
        finally:
            process.kill()
            process.wait()


def measure(setups: Sequence[Setup], works: Sequence[Work], repeats: int, at_once: bool) -> Times:
    """Every engine does every work `repeats` times, after one short turn that does not count.

    `at_once`: all engines are in memory and take turns; otherwise they are opened one after the
    other.
    """
    times: Times = {}
    for group in [setups] if at_once else [[setup] for setup in setups]:
        with ExitStack() as stack:
            workers = []
            for setup in group:
                progress(f"opening {setup.engine}")
                workers.append(stack.enter_context(opened(setup)))
            for work in works:
                systems: dict[str, Callable[[], int | Spent]] = {}
                for worker in workers:
                    systems |= worker.systems(work)
                for name, spent in interleave(systems, repeats, progress, {"nested": 1}).items():
                    times.setdefault(name, {})[work] = spent
    return times


def progress(text: str) -> None:
    """Show what is being done, on standard error."""
    print(text, file=sys.stderr, flush=True)


def milliseconds(spent: Spent, work: Work, clock: Clock) -> float:
    """Per token of each sequence."""
    return 1000 * getattr(spent, clock) / spent.tokens * work[0]


def ratios(times: Times, clock: Clock) -> dict[str, dict[Work, float]]:
    """Throughput relative to other rows: the median over repeats that lie side by side."""
    result = {}
    for name in times:
        if name not in ("teacher", "student"):
            result[f"{name} / teacher"] = _relative(times, clock, name, "teacher")
        if name.startswith("lockstep"):
            result[f"{name} / ideal"] = _relative(times, clock, name, "teacher", "student")
    cost = _relative(times, clock, "lockstep + alpha", "lockstep")
    result["cost of alpha statistics"] = {work: 1 / value - 1 for work, value in cost.items()}
    return {title: row for title, row in result.items() if row}


def _relative(times: Times, clock: Clock, name: str, *others: str) -> dict[Work, float]:
    """Median of (time of the others, summed) / (time of `name`); {} where one was not measured."""
    if not {name, *others} <= times.keys():
        return {}
    found = {}
    for work, own in times[name].items():
        # an engine with fewer repeats is compared on those
        repeats = zip(own, *(times[other][work] for other in others), strict=False)
        each = [[milliseconds(spent, work, clock) for spent in repeat] for repeat in repeats]
        found[work] = median(sum(against) / mine for mine, *against in each)
    return found


def report(
    times: Times, works: Sequence[Work], clocks: Sequence[Clock], setting: Mapping[str, Any]
) -> None:
    """A table for each clock, and one line of JSON with everything."""
    printed: dict[str, Any] = {**setting, "works": works}
    columns = ("sequences x new tokens", *(f"{batch} x {new}" for batch, new in works))
    for clock in clocks:
        rows = {
            name: {work: median(milliseconds(s, work, clock) for s in done[work]) for work in works}
            for name, done in times.items()
        }
        relative = ratios(times, clock)
        title = f"{clock} ms per token of each sequence, medians; then ratios of throughput"
        cells = [(name, *(f"{x:.2f}" for x in row.values())) for name, row in rows.items()]
        quotients = [(name, *(f"{x:.3f}" for x in row.values())) for name, row in relative.items()]
        Console().print(make_table(title, columns, cells, quotients))
        printed[clock] = {name: list(row.values()) for name, row in (rows | relative).items()}
    print(json.dumps(printed))
