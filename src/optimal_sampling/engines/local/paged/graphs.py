"""Forward passes recorded as CUDA graphs, by shape.

A decoding step of a small model is hundreds of kernels of a few microseconds each, which Python cannot launch fast
enough; a recorded graph is one launch. The inputs are copied into the tensors that the graph was recorded over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from optimal_sampling.engines.local.paged.layout import Batch, Shape

__all__ = ["CudaRecorder", "Graphs", "Recorder"]

Recorder: TypeAlias = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Runs a function over fixed tensors and returns what runs it again, and the tensor its result is then in."""

RECORD_AT = 3
"""A shape is recorded when it comes for this time: recording costs about ten forward passes."""
MOST_GRAPHS = 128


class CudaRecorder:
    """Records CUDA graphs. Those of one recorder share their memory, so they must not run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, forward: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """See `Recorder`."""
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            forward()  # what libraries do at their first call cannot be recorded
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            output = forward()
        return graph.replay, output


@dataclass(frozen=True, slots=True, eq=False)
class _Recorded:
    inputs: Batch
    replay: Callable[[], object]
    output: Tensor

    def __call__(self, batch: Batch) -> Tensor:
        self.inputs.ids.copy_(batch.ids)
        self.inputs.numbers.copy_(batch.numbers)
        self.replay()
        return self.output.clone()  # the next replay overwrites it


class Graphs:
    """Calls `forward`, from a recording where there is one. Where recording fails, `off` says why, once for all."""

    def __init__(self, forward: Callable[[Batch], Tensor], record: Recorder) -> None:
        self.off = ""
        self._forward = forward
        self._record = record
        self._seen: Counter[Shape] = Counter()
        self._recorded: dict[Shape, _Recorded] = {}

    def __len__(self) -> int:
        return len(self._recorded)

    def __call__(self, batch: Batch) -> Tensor:
        """The result of `forward`, the same in either way."""
        recorded = self._recorded.get(batch.shape)
        if recorded is not None:
            return recorded(batch)
        self._seen[batch.shape] += 1
        if self.off or self._seen[batch.shape] < RECORD_AT or len(self._recorded) >= MOST_GRAPHS:
            return self._forward(batch)
        return self._first(batch)

    def _first(self, batch: Batch) -> Tensor:
        inputs = Batch(batch.shape, batch.ids.clone(), batch.numbers.clone())
        try:
            replay, output = self._record(lambda: self._forward(inputs))
        except RuntimeError as error:  # a model that waits for the host cannot be recorded
            self.off = str(error).strip().splitlines()[0]
            return self._forward(batch)
        self._recorded[batch.shape] = _Recorded(inputs, replay, output)
        return self._recorded[batch.shape](batch)
