"""A process that grades one completion at a time: `python -m optimal_sampling.verify.worker FD`.

FD is a socket. JSON messages: a set-up, answered with `{}` or `{"error": ...}`; then tasks, each
answered with a grade.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from dataclasses import asdict
from math import ceil
from multiprocessing.connection import Connection
from typing import Any

from optimal_sampling.errors import OptimalSamplingError
from optimal_sampling.verify.graders import Grade, Grader, GraderSpec, Task, grade, load_grader

_GIB = 1 << 30
_NICENESS = 10  # the engine of a run comes first
_GRACE_SECONDS = 5  # after the limit of time, in which the parent ends this process itself


def main() -> None:
    """Grade until the socket is closed."""
    os.nice(_NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    logging.disable()  # math-verify warns that its own limit of time is off
    connection = Connection(int(sys.argv[1]))
    try:
        setup = json.loads(connection.recv_bytes())
        grader, failure = _load(setup)
        _send(connection, {"error": failure} if failure else {})
        while grader is not None:
            message = json.loads(connection.recv_bytes())
            _send(connection, asdict(_graded(message, grader, setup)))
    except (EOFError, ConnectionError):
        return


def _load(setup: dict[str, Any]) -> tuple[Grader | None, str]:
    """The grader, or why there is none."""
    limit = int(setup["memory_gib"] * _GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spec = GraderSpec(**setup["spec"])
    try:
        return load_grader(spec), ""
    except OptimalSamplingError as error:
        return None, str(error)
    except MemoryError:
        return None, f"{spec.name} needs more than {setup['memory_gib']} GiB to be loaded"


def _graded(message: dict[str, Any], grader: Grader, setup: dict[str, Any]) -> Grade:
    spec = GraderSpec(**setup["spec"])
    # Where the parent was killed, the system ends this process: the signal has no handler.
    signal.alarm(ceil(setup["timeout"]) + _GRACE_SECONDS)
    try:
        return grade(Task(**message), grader)
    except MemoryError:
        reason = f"the grader needed more than {setup['memory_gib']} GiB"
    except Exception as error:  # sympy may raise anything on one odd answer
        reason = f"the grader raised {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    return Grade(spec.verdict_of_failure, detail=reason, failed=True)


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    main()
