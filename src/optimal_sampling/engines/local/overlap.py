"""Two models' forward passes at the same time on one GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

__all__ = ["Overlap"]


@cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: PyTorch has few streams, and hands them out in turn."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Overlap:
    """A second queue of work. A small batch leaves most of a GPU idle, so two models' kernels can share it.

    What is queued `beside` starts after all that was queued before it, and `join` makes what follows wait for it. So
    memory of one queue is never used again while the other still reads it. On a CPU the work is simply done.
    """

    works: bool
    """Whether anything overlaps here."""

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
