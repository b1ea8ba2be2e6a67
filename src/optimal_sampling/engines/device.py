"""Device and precision of a run, and the work queues of a device.

Copies that wait for nothing, two models at once, times between points: on a CPU the same calls do
the work directly.
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

from optimal_sampling.errors import ConfigError

__all__ = ["HostCopy", "Overlap", "Stopwatch", "resolve_device", "resolve_dtype", "to_device"]


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:1` ... Raises ConfigError where it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} was asked for, but PyTorch finds no CUDA GPU here; use the device cpu"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} was asked for, but there are {torch.cuda.device_count()} GPUs here"
        )
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """The array as a tensor on the device, from pinned memory: other copies wait for the queue."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A tensor's copy on the host, queued when this is made; later work is not waited for."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied: Any = None
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def wait(self) -> np.ndarray:
        """The copy, once it is there."""
        if self._copied is not None:
            self._copied.synchronize()
        array: np.ndarray = self._tensor.numpy()
        return array


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
