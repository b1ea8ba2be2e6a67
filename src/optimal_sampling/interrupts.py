"""Ctrl-C and SIGTERM of the command `optimal-sampling`, from its first import to its exit code.

The package imports this first: where the process is that command, a signal during the other imports
ends it with a line. In any other program nothing is done. Imports nothing heavy.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["PROGRAM", "signals_interrupt"]

PROGRAM = "optimal-sampling"

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_SAME_WISH = 1.0
_SOON = 0.02


class Interrupt(KeyboardInterrupt):
    """What a signal raises.

    For a plain KeyboardInterrupt in code that was a string, such as dataclasses make, Python takes
    itself down by SIGINT at its end, also where it was caught; the exit code is then not 130.
    """


def _is_command(argument: str, words: Sequence[str]) -> bool:
    """Whether the process is the command itself, by `sys.argv[0]` and `sys.orig_argv`; not one that
    it started, nor a program that imports the package."""
    if argument == "-m":  # until the module that is asked for was found
        return "-m" in words[:-1] and words[words.index("-m") + 1] == "optimal_sampling"
    return os.path.basename(argument) == PROGRAM and argument in words[1:]


def _end(number: int, frame: FrameType | None) -> None:
    """End the process, in which nothing has begun."""
    try:
        os.write(2, f"\n{PROGRAM}: interrupted; nothing had been started\n".encode())
    finally:
        os._exit(130)


def _end_during_imports() -> None:
    for number, usual in _USUAL.items():
        if signal.getsignal(number) == usual:  # neither ignored, nor somebody's own
            signal.signal(number, _end)


if _is_command(sys.argv[0] if sys.argv else "", sys.orig_argv):
    _end_during_imports()


@contextmanager
def signals_interrupt(last_words: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; a later one ends the process at once, and
    `last_words` are printed.

    One that comes within `_SAME_WISH` seconds of the first says the same again: a key that was
    pressed twice, or a program that passes on what the terminal has sent to all.
    """
    later: dict[int, Any] = dict.fromkeys(_NUMBERS, signal.SIG_DFL)
    first: list[float] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            raise Interrupt
        if time.monotonic() - first[0] > _SAME_WISH:
            # not by `print`, in the middle of which this may be
            os.write(2, last_words().encode())
            signal.signal(number, later[number])
            os.kill(os.getpid(), number)

    try:
        before: dict[int, Any] = {each: signal.signal(each, interrupt) for each in _NUMBERS}
    except ValueError:  # signals belong to the main thread, and this is another
        yield
        return
    usual = {each: _USUAL[each] if old is _end else old for each, old in before.items()}
    try:
        with _never_ignored():
            yield
    except (ImportError, SystemError) as error:  # what some extension modules make of it
        if first:
            raise Interrupt from error
        raise
    finally:
        later.update(usual)
        for number, handler in usual.items():
            if not first:  # else a second key stroke may still come, while the process ends
                signal.signal(number, handler)


@contextmanager
def _never_ignored() -> Iterator[None]:
    """A KeyboardInterrupt that Python ignores is raised again.

    It ignores what is raised in callbacks of weak references, of which every import has one, and in
    finalizers: the signal would be lost, and the process would go on.
    """
    show = sys.unraisablehook
    alarm = signal.getsignal(signal.SIGALRM) or signal.SIG_DFL

    def raise_again(number: int, frame: FrameType | None) -> None:
        raise Interrupt

    def hook(ignored: Any) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            show(ignored)
            return
        # what is raised in this function would be ignored too
        signal.signal(signal.SIGALRM, raise_again)
        signal.setitimer(signal.ITIMER_REAL, _SOON)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = show
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
