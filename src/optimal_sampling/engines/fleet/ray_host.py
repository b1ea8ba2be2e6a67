"""What runs on a machine of a Ray cluster: an actor that starts a worker process and watches it.

Messages pass through as they are. The process ends with the actor: its socket closes. No Ray here,
and no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import queue
import selectors
import socket
import sys
import tempfile
import threading
import time
from io import FileIO
from pathlib import Path

import psutil

from optimal_sampling.engines.fleet.log_file import LogTail
from optimal_sampling.engines.fleet.messages import Setup, decode
from optimal_sampling.engines.fleet.placement import Place
from optimal_sampling.engines.fleet.process_worker import ProcessWorker
from optimal_sampling.version import __version__

__all__ = ["Host", "Polled"]

_LOADS_AT_ONCE = 2  # of one machine; each may need a copy of the weights in its memory
_SLOT_SECONDS = 0.5  # between two looks for a slot to load in

Polled = tuple[list[bytes], str, bytes]
"""Events, how the worker died ("" while it lives), and what was added to its log."""


class Host:
    """A worker process. `poll` runs in one thread, `order` in another, the rest in a third."""

    def __init__(self, index: int, cpus: float, gpus: float) -> None:
        """`cpus`, `gpus`: what Ray gives the actor of this machine."""
        self._index = index
        self._place = _place(cpus, gpus)
        self._worker: ProcessWorker | None = None
        self._started = threading.Event()
        self._orders: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._slot: socket.socket | None = None
        self._log: LogTail | None = None
        for end in (self._wake, self._woken):
            end.setblocking(False)

    def facts(self) -> tuple[str, str, str]:
        """Where this is, and the versions of this package and of Python."""
        return self._place.device, __version__, platform.python_version()

    def start(self, setup: bytes) -> bool:
        """Start the process, as soon as this machine has room for another that loads."""
        self._slot = _loading_slot()
        message = decode(setup)
        assert isinstance(message, Setup)
        handle, name = tempfile.mkstemp(prefix="optsamp-worker-")
        os.close(handle)
        self._log = LogTail(FileIO(name, "r+"))
        self._worker = ProcessWorker(self._index, self._place, message, Path(name))
        self._worker.start()
        os.unlink(name)  # it is read while it is open, and leaves nothing behind
        self._started.set()
        return True

    def order(self, messages: list[bytes]) -> None:
        """Hand orders to the process, without waiting for it."""
        for message in messages:
            self._orders.put(message)
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b".")

    def poll(self, seconds: float) -> Polled:
        """The events since the last call; waits so long for the first."""
        deadline = time.monotonic() + seconds
        if not self._started.wait(seconds) or self._worker is None:
            return [], "", b""
        while True:
            self._deliver()
            messages, death = self._receive(), self._worker.death()
            left = deadline - time.monotonic()
            if messages or death or left <= 0:
                return messages, death, self._new_log()
            self._select(left)

    def stop(self) -> None:
        """End the process, with all that it has started."""
        if self._worker is not None:
            self._worker.stop()

    def _deliver(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._woken.recv(4096):
                pass
        end = self._worker.end if self._worker else None
        while end is not None and not self._orders.empty():
            end.send_bytes(self._orders.get())

    def _receive(self) -> list[bytes]:
        end = self._worker.end if self._worker else None
        if end is None:
            return []
        end.flush()
        messages = list(end.receive_bytes())
        if self._slot is not None and (messages or end.is_closed):
            self._slot.close()  # the first event says that it has loaded, or failed to
            self._slot = None
        return messages

    def _select(self, seconds: float) -> None:
        """Wait for the process, or for orders to it."""
        end = self._worker.end if self._worker else None
        if end is None:
            return
        with selectors.DefaultSelector() as selector:
            writing = selectors.EVENT_WRITE if end.has_unsent else 0
            selector.register(end.socket, selectors.EVENT_READ | writing)
            selector.register(self._woken, selectors.EVENT_READ)
            selector.select(seconds)

    def _new_log(self) -> bytes:
        return self._log.read() if self._log is not None else b""


def _place(cpus: float, gpus: float) -> Place:
    """The share of this machine that Ray gave."""
    name = socket.gethostname()
    threads = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Place(f"GPU {visible} of {name}", threads, sharing=max(1, int(1 / gpus)))
    cores = len(os.sched_getaffinity(0))
    sharing = max(1, int(cores / max(1, cpus)))
    memory = int(psutil.virtual_memory().available) // sharing
    return Place(f"CPU of {name}", threads | {"CUDA_VISIBLE_DEVICES": ""}, memory, sharing)


def _loading_slot() -> socket.socket | None:
    """A place among the processes of this user that load at once on this machine; waits for one.

    A name of a socket, which the system frees with the process. None where there are no such names.
    """
    while sys.platform == "linux":
        for number in range(_LOADS_AT_ONCE):
            slot = socket.socket(socket.AF_UNIX)
            try:
                slot.bind(f"\0optimal-sampling-loading-{os.getuid()}-{number}")
            except OSError as error:
                slot.close()
                if error.errno != errno.EADDRINUSE:
                    return None
            else:
                return slot
        time.sleep(_SLOT_SECONDS)
    return None
