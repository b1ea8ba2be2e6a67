"""Engines in processes of their own, measured in turn; medians, ratios and tables. Knows nothing of what they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from engines import Setup

__all__ = ["Work", "measure", "ratios", "report"]

Work = tuple[int, int]
"""Sequences at once, and new tokens of each."""
Times = dict[str, dict[Work, list[dict[str, float]]]]
"""By engine and work: milliseconds per token of each sequence (`wall`, `cpu`) of every repeat."""

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

    def run(self, work: Work, repeat: int, trace: str = "off") -> dict[str, float]:
        """Milliseconds per token of each sequence."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{work[0]} {work[1]} {repeat} {trace}\n")
        self.process.stdin.flush()
        done = json.loads(self._answer("DONE"))
        return {name: 1000 * done[name] / done["tokens"] * work[0] for name in ("wall", "cpu")}

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

    `at_once`: all engines are in memory and take turns, so that a machine that gets busier does so for all of them.
    """
    times: Times = {}
    groups = [list(setups)] if at_once else [[setup] for setup in setups]
    for group in groups:
        with ExitStack() as stack:
            workers = []
            for setup in group:
                print(f"opening {setup.engine}", file=sys.stderr, flush=True)
                workers.append(stack.enter_context(opened(setup)))
            _rounds(workers, works, repeats, times)
    return times


def _rounds(workers: Sequence[Worker], works: Sequence[Work], repeats: int, times: Times) -> None:
    for work in works:
        for worker in workers:
            worker.run((work[0], min(8, work[1])), -1 - works.index(work))
        for repeat in range(repeats):
            for worker in workers:
                for name, done in _turn(worker, work, repeat):
                    times.setdefault(name, {}).setdefault(work, []).append(done)
                    print(
                        f"{work} {repeat + 1}/{repeats} {name}: {done}", file=sys.stderr, flush=True
                    )


def _turn(worker: Worker, work: Work, repeat: int) -> Iterator[tuple[str, dict[str, float]]]:
    """One engine's turn. Lockstep has two, with and without alpha statistics, first the one and then the other."""
    name = worker.setup.engine
    if name == "nested":  # so slow that a few tokens tell
        if repeat == 0:
            yield name, worker.run((work[0], min(8, work[1])), repeat)
    elif name == "lockstep":
        rows = [("lockstep", "off"), ("lockstep + alpha", "alpha")]
        for row, trace in rows[:: -1 if repeat % 2 else 1]:
            yield row, worker.run(work, repeat, trace)
    else:
        yield name, worker.run(work, repeat)


def ratios(times: Times, clock: str) -> dict[str, dict[Work, float]]:
    """Throughput relative to other rows of the table: the median over repeats that lie side by side."""
    pairs = {
        f"{name} / teacher": (name, ("teacher",))
        for name in times
        if name not in ("teacher", "student")
    }
    pairs |= {
        f"{name} / ideal": (name, ("teacher", "student"))
        for name in times
        if name.startswith("lockstep")
    }
    pairs["cost of alpha statistics"] = ("lockstep + alpha", ("lockstep",))
    result: dict[str, dict[Work, float]] = {}
    for title, (name, others) in pairs.items():
        if not {name, *others} <= times.keys():
            continue
        for work, own in times[name].items():
            against = [times[other][work] for other in others]
            values = [
                sum(each[clock] for each in row[1:]) / row[0][clock]
                for row in zip(own, *against, strict=False)
            ]
            result.setdefault(title, {})[work] = (
                1 / median(values) - 1 if "cost" in title else median(values)
            )
    return result


def report(
    times: Times, works: Sequence[Work], clocks: Sequence[str], setting: Mapping[str, Any]
) -> None:
    """A table for each clock, and one line of JSON with everything."""
    printed: dict[str, Any] = {**setting, "works": works}
    for clock in clocks:
        print(f"\n{clock} ms per token of each sequence, medians; then ratios of throughput")
        print(
            f"{'sequences x new tokens':26}"
            + "".join(f"{f'{batch} x {new}':>12}" for batch, new in works)
        )
        rows = {
            name: {work: median(each[clock] for each in done[work]) for work in works}
            for name, done in times.items()
        }
        relative = ratios(times, clock)
        for name, row in rows.items():
            print(f"{name:26}" + "".join(f"{row[work]:12.2f}" for work in works))
        for name, row in relative.items():
            print(f"{name:26}" + "".join(f"{row[work]:12.3f}" for work in works))
        printed[clock] = {name: list(row.values()) for name, row in (rows | relative).items()}
    print(json.dumps(printed))
