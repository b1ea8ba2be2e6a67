"""Work queues of a GPU: copies that wait for nothing, two models at once, times between points.

On a CPU the same calls do the work directly.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Overlap", "Stopwatch", "to_device"]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, from pinned memory: other copies wait for the queue."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: PyTorch has few streams, and hands them out in turn."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Overlap:
    """A second queue: a small batch leaves most of a GPU idle, so two models can share it.

    What is queued `beside` starts after all that was queued before it, and `join` makes what
    follows wait for it. So no queue reuses memory that the other still reads.
    """

    works: bool
    """Whether anything overlaps on this device."""

    def __init__(self, device: torch.device) -> None:
        self.works = device.type == "cuda"
        self._stream = _second_stream(device) if self.works else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Queue the work of this block beside what follows it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What follows waits for what was queued beside it."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


class Stopwatch:
    """Seconds between marks. On a GPU a mark is an event in its queue, which waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Set a mark after the work queued so far."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds from each mark to the next. On a GPU only after the last mark was reached."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._cuda:
            return [before.elapsed_time(after) / 1000 for before, after in pairs]
        return [after - before for before, after in pairs]
