"""The connection to a Ray cluster, or a local cluster for the time of one run.

Ray is imported on use. No telemetry; a local cluster listens on 127.0.0.1 alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import psutil

from optimal_sampling.errors import ConfigError, EngineError, MissingDependencyError

__all__ = ["Cluster", "ray_module"]

_ANSWER_SECONDS = 60.0  # for a cluster to answer; importing Ray takes a part of them
_PORT_SECONDS = 10.0  # for a connection to its port
_HEAD_SECONDS = 2.0  # the same, while a run goes
_START_TRIES = 3  # Ray gives up on a local cluster after 30 s, which a busy machine may need
_STORE_BYTES = 200 * 2**20  # of a local cluster's object store, which completions pass through
_MOST_LETTERS = 40  # of a folder in which Ray makes sockets, whose paths have a limit
_PREFIX = "optsamp-ray-"

_PROBE = """
import sys, ray
try:
    ray.init(sys.argv[1], log_to_driver=False, configure_logging=False)
except BaseException as error:
    cause = error.__cause__ or error
    sys.exit(f"{type(cause).__name__}: {cause}")
"""
"""Connects in a process of its own: `ray.init` cannot be stopped, and may end its process."""

_CLEAN_UP = """
import psutil, shutil, sys, time
def runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
found = []
for line in sys.stdin:
    try:
        found.append(psutil.Process(int(line)))
    except psutil.Error:
        pass
for each in found:
    try:
        each.kill()
    except psutil.Error:
        pass
end = time.monotonic() + 5
while any(map(runs, found)) and time.monotonic() < end:
    time.sleep(0.02)
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
"""Reads numbers of processes until its input ends, with the driver or before; then ends them, and
removes a folder. Without it, some of Ray's processes stay for minutes when a driver is killed."""


def ray_module() -> ModuleType:
    """The package `ray`, without its telemetry. Raises MissingDependencyError."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            "--ray needs Ray: pip install '.[ray]' in the folder of this package"
        ) from error
    module: ModuleType = ray
    return module


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(
        self, address: str, cpus: int | None = None, answer_seconds: float = _ANSWER_SECONDS
    ) -> None:
        """`address`: `local`, `auto`, or HOST:PORT. `cpus`: of a local cluster.

        A connection that the process has already is used, and left open. Raises ConfigError,
        EngineError, MissingDependencyError.
        """
        self._cleaner: subprocess.Popen[str] | None = None
        if address == "local":
            _prepare_local()
        self.ray = ray_module()
        self._is_ours = not self.ray.is_initialized()
        if not self._is_ours:
            return
        try:
            if address == "local":
                self._start_local(cpus)
            else:
                _probe(address, answer_seconds)
                self._connect(address)
        except BaseException:
            self.close()
            raise
        # Pages of a node's log, printed over the progress when a node dies; the driver says it too.
        self.ray._private.worker._worker_logs_enabled = False

    def _connect(self, address: str, **arguments: Any) -> None:
        try:
            with _own_signals():
                self.ray.init(address, log_to_driver=False, configure_logging=False, **arguments)
        except Exception as error:  # Ray raises any kind, such as Exception after 30 s of load
            reason = str(error).strip() or type(error).__name__
            raise EngineError(f"Ray could not be used at {address!r}: {reason}") from error

    def _start_local(self, cpus: int | None) -> None:
        for tries_left in reversed(range(_START_TRIES)):
            folder = _session_folder()
            self._cleaner = _cleaner(folder)
            before = _descendants()
            try:
                self._connect(
                    "local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    object_store_memory=_STORE_BYTES,
                    _temp_dir=folder,
                )
                return
            except EngineError:
                if not tries_left:
                    raise
            finally:
                self._hand_over(_descendants() - before)
            self._clean_up()

    def _hand_over(self, started: set[int]) -> None:
        """Have the cleaner end these processes."""
        assert self._cleaner is not None
        assert self._cleaner.stdin is not None
        self._cleaner.stdin.write("".join(f"{pid}\n" for pid in started))
        self._cleaner.stdin.flush()

    def _clean_up(self) -> None:
        if self._cleaner is not None:
            self._cleaner.communicate()
            self._cleaner = None

    def head_answers(self) -> bool:
        """Whether the head's server takes connections. Without it, Ray's own calls wait.

        Where it stays away for a minute, Ray ends this process.
        """
        host, _, port = self.ray.get_runtime_context().gcs_address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _HEAD_SECONDS).close()
        except OSError:
            return False
        return True

    def resources(self) -> dict[str, float]:
        """What all nodes that are alive have, by Ray's names."""
        return dict(self.ray.cluster_resources())

    def nodes(self) -> list[dict[str, float]]:
        """What each node that is alive has, by Ray's names."""
        return [dict(node["Resources"]) for node in self.ray.nodes() if node["Alive"]]

    def close(self) -> None:
        """Disconnect; end a local cluster, and remove its files. Closing twice is safe."""
        if self._is_ours:
            self._is_ours = False
            with _own_signals():
                self.ray.shutdown()
        self._clean_up()


def _prepare_local() -> None:
    """Set what a local cluster takes from the environment; Ray reads it when it is imported."""
    # Ray's switch for systems on which it has no clusters: its servers bind to 127.0.0.1.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # without a token, Ray writes one to the home
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _descendants() -> set[int]:
    """Numbers of the processes that this one has started, and that those have."""
    return {each.pid for each in psutil.Process().children(recursive=True)}


def _session_folder() -> str:
    """A new folder for the files of a local cluster."""
    parent = tempfile.gettempdir()
    if len(parent) > _MOST_LETTERS:
        parent = "/tmp"
    return tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent)


def _cleaner(folder: str) -> subprocess.Popen[str]:
    """The process that cleans up after a local cluster."""
    return subprocess.Popen(
        [sys.executable, "-c", _CLEAN_UP, folder],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _probe(address: str, seconds: float) -> None:
    """Raise ConfigError where no cluster answers at the address, or it refuses this process."""
    _check_port(address)
    command = [sys.executable, "-c", _PROBE, address]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise _no_answer(address, f"no Ray within {seconds:g} s") from None
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise ConfigError(f"the Ray cluster at {address!r} cannot be used: {reason}")


def _check_port(address: str) -> None:
    """Raise ConfigError where nothing listens at HOST:PORT."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), _PORT_SECONDS).close()
    except OSError as error:
        raise _no_answer(address, error.strerror or str(error)) from None
    except (OverflowError, UnicodeError) as error:  # no port, or no name of a host
        raise _no_answer(address, str(error)) from None


def _no_answer(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at {address!r} ({reason}). Start one with `ray start --head`, "
        "run this command on one of its machines, or use --ray local"
    )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by one that ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
