"""Forward passes recorded as CUDA graphs, by shape.

A decoding step of a small model is hundreds of GPU kernels of a few microseconds each, which
Python cannot launch fast enough; a recorded graph is one launch. The inputs are copied into the
tensors that the graph was recorded over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optimal_sampling.engines.local.memory import round_up
from optimal_sampling.engines.local.paged.page_cache import Batch, BatchShape

__all__ = ["CudaRecorder", "Graphs", "Recorder"]

Recorder: TypeAlias = Callable[[Callable[[], None]], Callable[[], object]]
"""Runs a function over fixed tensors and returns what runs it again."""

RECORD_AT = 3
"""A shape is recorded when it comes for this time: recording costs about ten forward passes."""
MOST_GRAPHS = 128
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

    After a recording has failed there are no more; `off` says why. All recordings write their
    results to the same memory: tensors that graphs returned would each keep their own.
    """

    def __init__(self, forward: Callable[[Batch], Tensor], record: Recorder) -> None:
        self.off = ""
        self._forward = forward
        self._record = record
        self._seen: Counter[BatchShape] = Counter()
        self._recorded: dict[BatchShape, _Recorded] = {}
        self._results: Tensor | None = None

    def __len__(self) -> int:
        return len(self._recorded)

    def settled(self, shape: BatchShape) -> bool:
        """Whether a pass of this shape will not be recorded later."""
        return shape in self._recorded or bool(self.off) or len(self._recorded) >= MOST_GRAPHS

    def __call__(self, batch: Batch) -> Tensor:
        """The result of `forward`, the same in either way."""
        recorded = self._recorded.get(batch.shape)
        if recorded is not None:
            return recorded(batch)
        self._seen[batch.shape] += 1
        result = self._forward(batch)
        if self._seen[batch.shape] >= RECORD_AT and not self.settled(batch.shape):
            self._add(batch, result)
        return result

    def _add(self, batch: Batch, result: Tensor) -> None:
        """Record the forward pass that just gave `result`."""
        inputs = Batch(batch.shape, batch.ids.clone(), batch.numbers.clone())
        output = self._memory_like(result)

        def forward() -> None:
            output.copy_(self._forward(inputs))

        try:
            self._recorded[batch.shape] = _Recorded(inputs, self._record(forward), output)
        except RuntimeError as error:  # a model that waits for the host cannot be recorded
            self.off = str(error).strip().splitlines()[0]

    def _memory_like(self, result: Tensor) -> Tensor:
        """Memory of this shape; earlier recordings keep the smaller one that they write to."""
        if self._results is None or len(self._results) < len(result):
            rows = round_up(len(result), OUTPUT_ROWS)
            self._results = result.new_empty(rows, *result.shape[1:])
        return self._results[: len(result)]
