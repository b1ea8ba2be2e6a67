"""A worker process: `python -m optimal_sampling.engines.fleet.worker_main FD LIFELINE`.

FD and LIFELINE are sockets. It ends with its driver: when one of them is closed, or its parent has
changed.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

from optimal_sampling.engines.fleet.channel import WorkerEnd
from optimal_sampling.engines.fleet.messages import Broken, Event, Progress, Setup
from optimal_sampling.errors import ServedModelError, UserError

if TYPE_CHECKING:
    from optimal_sampling.engines.fleet.serving import EngineServer

_BEAT = 1.0  # seconds between two looks at parent and progress
_STUCK = 1200.0  # seconds without a look, after which this process ends itself


def main() -> None:
    """Serve until the driver ends this process."""
    faulthandler.enable()  # where it was, for a segmentation fault, goes to the log
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver
    parent = os.getppid()
    sock, lifeline = (socket.socket(fileno=int(text)) for text in sys.argv[1:3])
    for each in (sock, lifeline):
        each.set_inheritable(False)
    _end_with(lifeline)
    end = WorkerEnd(sock)
    try:
        setup = end.receive()
    except (EOFError, OSError):
        return
    assert isinstance(setup, Setup)
    # torch is loaded here
    from optimal_sampling.engines.fleet.serving import EngineServer

    def send(event: Event) -> None:
        try:
            end.send(event)
        except OSError:
            _end_all()

    server = EngineServer(setup, send)
    for target in (_read, _watch):
        threading.Thread(target=target, args=(end, server, parent), daemon=True).start()
    try:
        server.load()
        server.serve()
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        send(_broken(error, is_serving=server.is_serving))
        raise SystemExit(1) from None


def _end_with(lifeline: socket.socket) -> None:
    """Have the kernel kill this process's group when the other end is closed.

    That also holds while it is stopped, or while a thread keeps the interpreter to itself. On Linux
    alone; elsewhere it ends as soon as its threads run.
    """
    if sys.platform == "linux" and os.getpgrp() == os.getpid():
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(lifeline, fcntl.F_GETFL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)


def _broken(error: BaseException, *, is_serving: bool) -> Broken:
    """Why the worker ends; with the class of the error where only the user can help.

    While requests are served, one of them may be the reason, and the others go on; but a worker
    that is started again would take another served model for the one that the run began with.
    """
    name = type(error).__name__
    is_of_request = is_serving and not isinstance(error, ServedModelError)
    if isinstance(error, UserError | ServedModelError) and not is_of_request:
        return Broken(str(error), name)
    text = str(error).strip()
    return Broken(f"it raised {name}: {text}" if text else f"it raised {name}")


def _read(end: WorkerEnd, server: EngineServer, parent: int) -> None:
    """Deliver orders until the driver has gone."""
    try:
        while True:
            server.deliver(end.receive())
    except (EOFError, OSError):
        _end_all()


def _watch(
    end: WorkerEnd,
    server: EngineServer,
    parent: int,
    beat: float = _BEAT,
    stuck: float = _STUCK,
) -> None:
    """Tell the driver of progress, and end when it has gone."""
    told: Progress | None = None
    while True:
        # a thread that keeps the interpreter to itself stops this one too
        faulthandler.dump_traceback_later(stuck, exit=True)
        time.sleep(beat)
        faulthandler.cancel_dump_traceback_later()  # a driver that is paused may read nothing
        if os.getppid() != parent:
            _end_all()
        if (progress := server.progress) is not None and progress != told:
            told = progress
            try:
                end.send(progress)
            except OSError:
                _end_all()


def _end_all() -> NoReturn:
    """End this process and those that it has started, which are a group of their own."""
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
