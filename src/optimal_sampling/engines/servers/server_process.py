"""A server in a process of its own: started, waited for, ended with all that it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

from optimal_sampling.errors import ConfigError, EngineError

__all__ = ["ServerProcess", "check_port", "free_port"]

_GRACE = 15.0
"""Seconds between the signal that ends a server and the one that ends it at once."""
_PR_SET_PDEATHSIG = 1
_ENDING = (signal.SIGINT, signal.SIGTERM)
_TAIL = 1500


@dataclass
class ServerProcess:
    """A command that serves at an address. A `with` block ends it."""

    name: str
    command: Sequence[str]
    url: str
    log: Path
    """File with what the server prints."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of this process."""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it, in a process group of its own. It ends when this process does.

        A signal that comes meanwhile is handled after it: `stop` has to know of the process.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log, _signals_wait():
            self.process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(_prepare, os.getpid()),
            )
        return self

    def wait(self, patience: float, tick: Callable[[str, float], None]) -> None:
        """Wait until it answers; `tick(name, seconds so far)` is called twice a second.

        Raises EngineError where it ends before, or takes longer than `patience` seconds.
        """
        started = time.monotonic()
        while not self._is_healthy():
            waited = time.monotonic() - started
            assert self.process is not None, "not started"
            if (code := self.process.poll()) is not None:
                raise self._error(f"ended with code {code} after {waited:.0f} s")
            if waited > patience:
                raise self._error(f"does not answer after {waited:.0f} s")
            tick(self.name, waited)
            time.sleep(0.5)

    @property
    def has_ended(self) -> bool:
        """Whether the process is no longer there."""
        return self.process is None or self.process.poll() is not None

    def stop(self) -> None:
        """End it and its children."""
        if self.process is None:
            return
        try:
            self._signal_all(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE)
        finally:
            self._signal_all(signal.SIGKILL)
        self.process.wait()
        self.process = None

    def _signal_all(self, number: signal.Signals) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def printable(self) -> str:
        """The command for a shell, an option per line."""
        lines = [""]
        for word in self.command:
            if word.startswith("--"):
                lines.append("   ")
            lines[-1] += f" {shlex.quote(word)}"
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, " \\\n".join(lines).strip()])

    def _is_healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False

    def _error(self, what: str) -> EngineError:
        lines = self.log.read_text(errors="replace")[-_TAIL:]
        return EngineError(
            f"the server of the {self.name} {what}. The end of its log ({self.log}):\n{lines}"
        )


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int, option: str) -> None:
    """Raises ConfigError where the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host}, port {port}: {error.strerror}; choose another {option}"
            ) from error


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM are held back while the block lasts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _prepare(parent: int) -> None:
    """Let signals through again, and have SIGTERM sent when the parent dies, also where it is
    killed. Runs in the new process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it has died before that
            os.kill(os.getpid(), signal.SIGTERM)
