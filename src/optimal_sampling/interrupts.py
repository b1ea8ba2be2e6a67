"""Ctrl-C and SIGTERM of the command `optimal-sampling`, from its first import to its exit code.

The package imports this first: where the process is that command, a signal during the other imports
ends it with a line. In any other program nothing is done.
"""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["PROGRAM", "signals_interrupt"]

PROGRAM = "optimal-sampling"

_USUAL: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


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
        before = signal.signal(number, _end)
        if before != usual:  # ignored, or somebody's own
            signal.signal(number, before)


if _is_command(sys.argv[0] if sys.argv else "", sys.orig_argv):
    _end_during_imports()

import inspect  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator, Sequence  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from types import FrameType  # noqa: E402
from typing import Any  # noqa: E402

_NUMBERS = (signal.SIGINT, signal.SIGTERM)
_SAME_WISH = 1.0
_SOON = 0.02
_LONGEST_IMPORT = 1.0
"""Seconds after which the process is ended in the middle of an import, where an exception could
make extension modules abort."""
_IMPORT = "<frozen importlib._bootstrap>"


class Interrupt(KeyboardInterrupt):
    """What a signal raises.

    For a plain KeyboardInterrupt in code that was a string, such as dataclasses make, Python takes
    itself down by SIGINT at its end, also where it was caught; the exit code is then not 130.
    """


@contextmanager
def signals_interrupt(last_words: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Interrupt; a later one ends the process at once, and `last_words`
    are printed.

    One that comes within `_SAME_WISH` seconds of the first says the same again: a key that was
    pressed twice, or a program that passes on what the terminal has sent to all.
    """
    handler = _Handler(last_words)
    try:
        before: dict[int, Any] = {each: signal.signal(each, handler) for each in _NUMBERS}
    except ValueError:  # signals belong to the main thread, and this is another
        yield
        return
    usual = {each: _USUAL[each] if old is _end else old for each, old in before.items()}
    try:
        with _raised_again(handler):
            yield
    except (ImportError, SystemError) as error:  # what some extension modules make of it
        if handler.first is not None:
            raise Interrupt from error
        raise
    finally:
        handler.later.update(usual)
        for number, old in usual.items():
            if handler.first is None:  # else a second key stroke may still come, during the end
                signal.signal(number, old)


class _Handler:
    """Raises Interrupt once, and not in the middle of an import.

    What imports run would ignore it (callbacks of weak references), catch it, make another error
    of it, or end the process by it (extension modules).
    """

    def __init__(self, last_words: Callable[[], str]) -> None:
        self.last_words = last_words
        self.later: dict[int, Any] = dict.fromkeys(_NUMBERS, signal.SIG_DFL)
        self.first: float | None = None
        """When the first signal came, by `time.monotonic()`."""
        self._is_raised = False
        self._outer_imports = _imports(inspect.currentframe())
        """Of a program that runs the command while it is imported."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, or the alarm after which an earlier one is handled again."""
        now = time.monotonic()
        self.first = now if self.first is None else self.first
        if number in self.later and now - self.first > _SAME_WISH:
            # not by `print`, in the middle of which this may be
            os.write(2, self.last_words().encode())
            signal.signal(number, self.later[number])
            os.kill(os.getpid(), number)
        if self._is_raised:
            return
        if _imports(frame) > self._outer_imports:
            if now - self.first > _LONGEST_IMPORT:
                os.write(2, self.last_words().encode())
                os._exit(130)
            self.again()
            return
        self._is_raised = True
        raise Interrupt

    def again(self) -> None:
        """Raise Interrupt a little later."""
        self._is_raised = False
        signal.signal(signal.SIGALRM, self)
        signal.setitimer(signal.ITIMER_REAL, _SOON)


@contextmanager
def _raised_again(handler: _Handler) -> Iterator[None]:
    """An Interrupt that Python ignores, in a callback of a weak reference or in a finalizer, is
    raised again: the signal would be lost, and the process would go on."""
    show = sys.unraisablehook
    alarm = signal.getsignal(signal.SIGALRM) or signal.SIG_DFL

    def hook(ignored: Any) -> None:
        if issubclass(ignored.exc_type, Interrupt):
            handler.again()  # what is raised in this function would be ignored too
        else:
            show(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = show
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)


def _imports(frame: FrameType | None) -> int:
    """Number of frames of imports in progress."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == _IMPORT
        frame = frame.f_back
    return count
