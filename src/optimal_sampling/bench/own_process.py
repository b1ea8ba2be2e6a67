"""Tasks in a process of their own, which may die: an illegal access on a GPU ends the process.

Results come as they are made. After a loss the tasks that are left go on in a new process.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeAlias, TypeVar

__all__ = ["Broken", "in_own_process"]

BROKEN = 75
"""Exit code of a process that another is to take over from."""
TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
Work: TypeAlias = Callable[[Sequence[TaskT]], Iterable[ResultT]]
"""One result per task, in order. Raises Broken after a result that leaves nothing usable."""


class Broken(Exception):
    """This process can do no more; what it has yielded counts."""


def in_own_process(
    work: Work[TaskT, ResultT], tasks: Sequence[TaskT], lost: Callable[[TaskT, str], ResultT]
) -> Iterator[ResultT]:
    """The results of `work(tasks)`, which has to be picklable, as its arguments and results.

    `lost`: the result of a task at which the process died, given how. What `work` raises is
    raised here. The process ends with the iterator.
    """
    context = multiprocessing.get_context("spawn")
    left = list(tasks)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(work, left, sender), daemon=True)
        process.start()
        sender.close()
        try:
            for result in _received(receiver):
                del left[0]
                yield result
            process.join()
        finally:
            process.kill()
        if left and process.exitcode != BROKEN:
            yield lost(left.pop(0), f"its process ended with code {process.exitcode}")


def _received(receiver: Connection) -> Iterator[Any]:
    """Results until the other end is closed. Raises the error that it sent."""
    while True:
        try:
            result, error = receiver.recv()
        except EOFError:
            return
        if error is not None:
            raise error
        yield result


def _serve(work: Work[TaskT, ResultT], tasks: Sequence[TaskT], sender: Connection) -> None:
    """What the process runs."""
    try:
        for result in work(tasks):
            sender.send((result, None))
    except Broken:
        sys.exit(BROKEN)
    except Exception as error:
        sender.send((None, error))
