"""Graders in processes. A completion on which one hangs or dies costs that process alone."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Generic, Self, TypeVar

from optimal_sampling.errors import ConfigError, OptimalSamplingError
from optimal_sampling.verify.graders import Grade, GraderSpec, Task, resolve_grader

__all__ = ["GraderPool", "default_workers"]

Tag = TypeVar("Tag")

_START_SECONDS = 300.0  # for a process to import what it needs, on a busy machine
_EXIT_SECONDS = 0.5  # for a process that has closed its socket to end
_ANOTHER_ANSWER = r"\boxed{0}"
_IN_FLIGHT = 4  # completions per process that `map` keeps submitted


def default_workers() -> int:
    """Half of the cores that this process may use, at most 8."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2))


class GraderPool(Generic[Tag]):
    """Completions in, grades out as they are finished, each with the tag it was submitted with.

    A context manager, which ends all processes. Not for several threads at once.

    A grader that takes longer than `timeout` seconds, needs more than `memory_gib`, or dies, is
    replaced, and the grade of that completion says so (`failed`, `detail`).

    Raises ConfigError where the grader cannot be loaded, OptimalSamplingError where no process
    can be started.
    """

    def __init__(
        self,
        grader: str | GraderSpec,
        *,
        workers: int | None = None,
        timeout: float = 10.0,
        memory_gib: float = 4.0,
    ) -> None:
        self.spec = resolve_grader(grader) if isinstance(grader, str) else grader
        self.workers = default_workers() if workers is None else workers
        self.pending = 0
        """Submitted, and not given back yet."""
        self._setup = {
            "spec": asdict(self.spec),
            "timeout": timeout,
            "memory_gib": memory_gib,
        }
        self._tasks: queue.SimpleQueue[tuple[Tag, Task] | None] = queue.SimpleQueue()
        self._grades: queue.SimpleQueue[tuple[Tag, Grade] | Exception] = queue.SimpleQueue()
        self._processes = [_Process(self._setup) for _ in range(self.workers)]
        self._threads: list[threading.Thread] = []

    def check(self) -> None:
        """Load the grader in one process, or raise what is wrong with it."""
        self._processes[0].start()

    def submit(self, tag: Tag, task: Task) -> None:
        """Grade a completion as soon as a process is free."""
        if len(self._threads) < self.workers:
            process = self._processes[len(self._threads)]
            thread = threading.Thread(target=self._serve, args=(process,), daemon=True)
            self._threads.append(thread)
            thread.start()
        self.pending += 1
        self._tasks.put((tag, task))

    def ready(self) -> Iterator[tuple[Tag, Grade]]:
        """Those finished by now."""
        while not self._grades.empty():
            yield self._next()

    def drain(self) -> Iterator[tuple[Tag, Grade]]:
        """All that are pending, as they are finished."""
        while self.pending:
            yield self._next()

    def map(self, tasks: Iterable[tuple[Tag, Task]]) -> Iterator[tuple[Tag, Grade]]:
        """Grade all, as they are finished; few are read ahead."""
        for tag, task in tasks:
            self.submit(tag, task)
            if self.pending >= _IN_FLIGHT * self.workers:
                yield self._next()
            yield from self.ready()
        yield from self.drain()

    def _next(self) -> tuple[Tag, Grade]:
        item = self._grades.get()
        if isinstance(item, Exception):
            raise item
        self.pending -= 1
        return item

    def _serve(self, process: _Process) -> None:
        """Feed one process, in a thread of its own, which mostly waits."""
        while (item := self._tasks.get()) is not None:
            tag, task = item
            try:
                self._grades.put((tag, process.grade(task)))
            except Exception as error:
                self._grades.put(error)
                return

    def close(self) -> None:
        """End all processes; what is pending is dropped. Closing twice is safe."""
        while not self._tasks.empty():
            self._tasks.get()
        for process in self._processes:
            process.kill()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.end(seconds=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Process:
    """One process with a grader, started on use and replaced when it has ended."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._spec = GraderSpec(**setup["spec"])
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._starting = threading.Lock()
        self._lock = threading.Lock()
        self._is_closed = False

    def start(self) -> None:
        """Start the process, unless it runs, and wait until its grader is loaded."""
        with self._starting:
            if self._connection is None:
                self._start()

    def _start(self) -> None:
        try:
            self._connect()
            self._send(self._setup)
            reply = self._receive(_START_SECONDS)
        except (OSError, EOFError) as error:
            raise OptimalSamplingError(
                f"no process of the grader {self._spec.name} could be started: "
                f"{self.end() or error}"
            ) from error
        if reply is None:
            self.end()
            raise ConfigError(
                f"the grader {self._spec.name} was not loaded within {_START_SECONDS:g} s"
            )
        if "error" in reply:
            self.end()
            raise ConfigError(reply["error"])

    def _connect(self) -> None:
        ours, theirs = Pipe()
        with self._lock, theirs:
            if self._is_closed:
                raise EOFError
            self._process = subprocess.Popen(
                [sys.executable, "-m", "optimal_sampling.verify.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a user's function prints
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            self._connection = ours

    def grade(self, task: Task) -> Grade:
        """The grade of a completion, which a failed one has too.

        `math` may have failed on the reference, and not on the answer: another answer shows it.
        """
        grade = self._grade(task)
        if not grade.failed or self._spec.name != "math":
            return grade
        is_the_reference = self._grade(replace(task, completion=_ANOTHER_ANSWER)).failed
        if not is_the_reference:
            return grade
        return replace(grade, verdict="skipped", detail=f"{grade.detail}, for the reference alone")

    def _grade(self, task: Task) -> Grade:
        self.start()
        timeout = self._setup["timeout"]
        try:
            self._send(asdict(task))
            reply = self._receive(timeout)
        except (OSError, EOFError):
            reason = f"the grader's process ended ({self.end()})"
        else:
            if reply is not None:
                return Grade(**reply)
            self.end(seconds=0)
            reason = f"the grader took longer than {timeout:g} s"
        return Grade(self._spec.verdict_of_failure, detail=reason, failed=True)

    def _send(self, message: dict[str, Any]) -> None:
        if self._connection is None:
            raise EOFError
        self._connection.send_bytes(json.dumps(message).encode())

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message; None where none came in time."""
        if self._connection is None:
            raise EOFError
        if not self._connection.poll(seconds):
            return None
        message: dict[str, Any] = json.loads(self._connection.recv_bytes())
        return message

    def end(self, seconds: float = _EXIT_SECONDS) -> str:
        """End the process; how it had ended within `seconds` by itself, in words."""
        with self._lock:
            process, connection = self._process, self._connection
            self._process = self._connection = None
        if process is None:
            return ""
        if connection is not None:
            connection.close()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return ""
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """Let the process end for good; a thread that waits for it goes on."""
        with self._lock:
            self._is_closed = True
            if self._process is not None:
                self._process.kill()
