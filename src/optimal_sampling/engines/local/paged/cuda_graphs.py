"""Forward passes recorded as CUDA graphs, by shape.

A decoding step of a small model is hundreds of GPU kernels of a few microseconds each, which
Python cannot launch fast enough; a recorded graph is one launch. The inputs are copied into the
tensors that the graph was recorded over.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optimal_sampling.engines.local.memory import round_up
from optimal_sampling.engines.local.paged.page_cache import Batch, BatchShape
from optimal_sampling.engines.local.runner import Recordings

__all__ = ["RECORD_AT", "RECORD_BESIDE", "CudaRecorder", "Graphs", "Recorder"]

Recorder: TypeAlias = Callable[[Callable[[], None]], Callable[[], object]]
"""Runs a function over fixed tensors and returns what runs it again."""

RECORD_AT = 3
"""A shape is recorded when it comes for this time: recording costs about ten forward passes."""
RECORD_BESIDE = 64
"""The same where a larger recorded shape serves until then: this saves a part of a pass only."""
MOST_GRAPHS = 128
"""Of one cache; the one that was used least recently is dropped for another."""
OUTPUT_ROWS = 256
"""Rows by which the memory for results grows."""


class CudaRecorder:
    """Records CUDA graphs. Those of one recorder share memory, and must not run at the same time.

    Each recorder has a stream of its own: libraries keep a workspace per stream, and graphs of two
    models that shared one would overwrite it when they run side by side.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: Any = None

    def __call__(self, forward: Callable[[], None]) -> Callable[[], object]:
        """Record `forward`, which has run before: first calls of libraries cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                forward()
        except RuntimeError:
            torch.cuda.set_stream(current)  # a recording that fails does not go back to it
            raise
        return graph.replay


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    inputs: Batch
    replay: Callable[[], object]
    output: Tensor

    def __call__(self, batch: Batch) -> Tensor:
        self.inputs.ids.copy_(batch.ids)
        self.inputs.numbers.copy_(batch.numbers)
        self.replay()
        return self.output.clone()  # the next replay, of whatever shape, overwrites it


class Graphs:
    """Calls `forward`, from a recording where there is one.

    A shape is recorded when it comes for the RECORD_AT-th time, or by `prepare`; at most `most`
    are kept. Where memory runs out the shape is skipped; after another failure there are no more
    recordings, and `off` says why. All recordings write their results to the same memory: tensors
    that graphs returned would each keep their own.
    """

    def __init__(
        self, forward: Callable[[Batch], Tensor], record: Recorder, most: int = MOST_GRAPHS
    ) -> None:
        self.off = ""
        self._forward = forward
        self._record = record
        self._most = most
        self._seen: Counter[BatchShape] = Counter()
        self._skipped: set[BatchShape] = set()
        self._recorded: OrderedDict[BatchShape, _Recorded] = OrderedDict()
        self._results: Tensor | None = None

    @property
    def recordings(self) -> Recordings:
        """So far."""
        return Recordings(len(self._recorded), len(self._skipped), self.off)

    def settled(self, shape: BatchShape) -> bool:
        """Whether a pass of this shape will not be recorded later."""
        return shape in self._recorded or shape in self._skipped or bool(self.off)

    def stand_in(self, shape: BatchShape) -> BatchShape | None:
        """A recorded shape that holds this one, which is counted; None: this one is to run.

        A graph over more rows and keys costs a little more, and a pass without a graph many times
        as much, so a shape that another stands in for is recorded when it has come RECORD_BESIDE
        times.
        """
        if shape in self._recorded:
            return None
        fitting = [each for each in self._recorded if each.holds(shape)]
        if not fitting:
            return None
        if self._seen[shape] + 1 >= RECORD_BESIDE and not self.settled(shape):
            return None
        self._seen[shape] += 1
        return min(fitting, key=lambda each: (each.rows, each.max_keys))

    def __call__(self, batch: Batch) -> Tensor:
        """The result of `forward`, the same in either way."""
        recorded = self._recorded.get(batch.shape)
        if recorded is not None:
            self._recorded.move_to_end(batch.shape)
            return recorded(batch)
        self._seen[batch.shape] += 1
        result = self._forward(batch)
        if self._seen[batch.shape] >= RECORD_AT and not self.settled(batch.shape):
            self._add(batch, result)
        return result

    def prepare(self, batch: Batch) -> None:
        """Record this shape now, on a batch that may be written over."""
        if not self.settled(batch.shape):
            self._add(batch, self._forward(batch))

    def _add(self, batch: Batch, result: Tensor) -> None:
        """Record the forward pass that just gave `result`."""
        # kept until the recording is done, which waits for the GPU: it may be running
        dropped = self._drop_oldest() if len(self._recorded) >= self._most else None
        try:
            inputs = Batch(batch.shape, batch.ids.clone(), batch.numbers.clone())
            output = self._memory_like(result)

            def forward() -> None:
                output.copy_(self._forward(inputs))

            self._recorded[batch.shape] = _Recorded(inputs, self._record(forward), output)
        except RuntimeError as error:
            causes = list(_causes(error))
            if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
                self._skipped.add(batch.shape)
            else:  # a model that waits for the host cannot be recorded
                self.off = _first_line(causes[-1])
        del dropped

    def _drop_oldest(self) -> _Recorded:
        """Forget the recording that was used least recently; its shape is counted anew."""
        shape, recorded = self._recorded.popitem(last=False)
        del self._seen[shape]
        return recorded

    def _memory_like(self, result: Tensor) -> Tensor:
        """Memory of this shape; earlier recordings keep the smaller one that they write to."""
        if self._results is None or len(self._results) < len(result):
            rows = round_up(len(result), OUTPUT_ROWS)
            self._results = result.new_empty(rows, *result.shape[1:])
        return self._results[: len(result)]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that were being handled when it was raised, back to the first.

    Ending a recording that has failed fails too, and its message hides what happened.
    """
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
