"""Workers that are processes on this machine."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from optimal_sampling.engines.fleet.channel import DriverEnd
from optimal_sampling.engines.fleet.log_file import keep_short, last_lines
from optimal_sampling.engines.fleet.messages import Begin, Event, Run, Setup, Submit
from optimal_sampling.engines.fleet.placement import Place
from optimal_sampling.engines.fleet.worker import Launcher, Worker
from optimal_sampling.records.store import make_folder
from optimal_sampling.types import Request

__all__ = ["ProcessLauncher", "ProcessWorker"]

_EXIT_SECONDS = 5.0  # for a process that has closed its socket to end


class ProcessWorker(Worker):
    """A process with a log file."""

    def __init__(self, index: int, place: Place, setup: Setup, log: Path) -> None:
        self.name = f"worker {index}"
        self.device = place.device
        self.log = log
        self._place = place
        self._setup = replace(setup, memory=place.memory, sharing=place.sharing)
        self._process: subprocess.Popen[bytes] | None = None
        self._end: DriverEnd | None = None
        self._lifeline: socket.socket | None = None
        """Carries nothing; where it closes, the worker ends."""
        self._has_exited = False
        self._failure = "it was not started"

    def start(self) -> None:
        """As in `Worker`. The process leads a group of its own."""
        self._has_exited = False
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            try:
                pairs = [_pair(ours, theirs) for _ in range(2)]
                with self.log.open("ab") as log:
                    line = f"=== {time.strftime('%F %T')} {self.name} on {self.device}\n"
                    log.write(line.encode())
                    log.flush()
                    self._process = self._popen([end.fileno() for _, end in pairs], log)
            except OSError as error:  # of the log file; no memory; too many open files
                self._failure = f"it could not be started: {error}"
                return
            ours.pop_all()
        self._end, self._lifeline = DriverEnd(pairs[0][0]), pairs[1][0]
        self._end.send(self._setup)

    def _popen(self, ends: Sequence[int], log: BinaryIO) -> subprocess.Popen[bytes]:
        # -P: a file of the working directory must not take the place of a module
        return subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.worker_main", *map(str, ends)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=ends,
            env=os.environ | {"PYTHONPATH": _python_path()} | self._place.environment,
            start_new_session=True,
        )

    @property
    def pid(self) -> int | None:
        """Of the process; None where there is none."""
        return self._process.pid if self._process else None

    @property
    def end(self) -> DriverEnd | None:
        """The driver's end of the socket; None where there is no process."""
        return self._end

    def begin(self, run: Run) -> None:
        """As in `Worker`."""
        if self._end is not None:
            self._end.send(Begin(run))

    def submit(self, run: int, requests: Mapping[int, Request]) -> None:
        """As in `Worker`."""
        if self._end is not None:
            self._end.send(Submit(run, tuple(requests.items())))

    def events(self) -> Sequence[Event]:
        """As in `Worker`."""
        if self._end is None:
            return []
        self._end.flush()
        return list(self._end.receive())

    def death(self) -> str:
        """As in `Worker`."""
        if self._end is None or self._process is None:
            return self._failure
        if not self._end.is_closed:
            # a process that it has forked may hold the socket open; what it sent is read first
            had_exited, self._has_exited = self._has_exited, self._process.poll() is not None
            if not had_exited:
                return ""
        try:
            code = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        return _ending(code)

    def stop(self) -> None:
        """As in `Worker`."""
        process, self._process = self._process, None
        end, self._end = self._end, None
        lifeline, self._lifeline = self._lifeline, None
        for each in (end, lifeline):
            if each is not None:
                each.close()
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a device may hold it for ever
            process.wait(_EXIT_SECONDS)

    def tidy(self) -> None:
        """As in `Worker`."""
        keep_short(self.log)

    def last_words(self) -> str:
        """As in `Worker`."""
        return last_lines(self.log)


def _ending(code: int) -> str:
    """How a process ended, by its exit code, which is negative for a signal."""
    if code == -signal.SIGKILL:
        return "killed by SIGKILL (the kernel does that where memory runs out)"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _pair(*stacks: contextlib.ExitStack) -> list[socket.socket]:
    """Two ends of a socket, each closed with the stack at its place."""
    pair = socket.socketpair()
    return [stack.enter_context(end) for stack, end in zip(stacks, pair, strict=True)]


def _python_path() -> str:
    return os.pathsep.join(each or os.curdir for each in sys.path)


class ProcessLauncher(Launcher):
    """One process per place."""

    def __init__(self, places: Sequence[Place], setup: Setup, logs: Path) -> None:
        """`logs`: folder of the log files. Raises RunFolderError, StorageError."""
        self.size = len(places)
        self._places = places
        self._setup = setup
        self._logs = logs
        make_folder(logs)

    def worker(self, index: int) -> ProcessWorker:
        """As in `Launcher`."""
        log = self._logs / f"worker-{index}.log"
        return ProcessWorker(index, self._places[index], self._setup, log)

    def wait(self, workers: Sequence[Worker], seconds: float) -> Collection[Worker]:
        """As in `Launcher`."""
        dead: list[Worker] = []
        with selectors.PollSelector() as selector:  # needs no file descriptor of its own
            for worker in workers:
                assert isinstance(worker, ProcessWorker)
                if worker.end is None:
                    dead.append(worker)
                    continue
                writing = selectors.EVENT_WRITE if worker.end.has_unsent else 0
                selector.register(worker.end.socket, selectors.EVENT_READ | writing, worker)
            if dead:
                return dead
            return [key.data for key, _ in selector.select(seconds)]
