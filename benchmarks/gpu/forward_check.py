"""Forward passes of two loaded models: recorded against eager, and both at once against in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimal_sampling.engines.device import Overlap
from optimal_sampling.engines.local.paged.cuda_graphs import RECORD_AT
from optimal_sampling.engines.local.paged.page_cache import PageCache
from optimal_sampling.engines.local.paged.page_runner import PageRunner
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["Pass", "check_overlap", "check_padding", "check_replay", "milliseconds"]

AT_ONCE = 20
"""Rounds in which both models run at once."""
TIMED = 10
"""Passes."""
ALLOWED = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-3}
"""Largest accepted difference of a padded pass from an unpadded one, whose matrix products have
other shapes, relative: root mean squares."""


@dataclass(frozen=True, eq=False)
class Pass:
    """The same forward pass of one model, as often as it is called."""

    runner: PageRunner
    cache: PageCache
    tokens: Tensor
    start: np.ndarray
    chunks: Sequence[Chunk] = ()

    @classmethod
    def of(
        cls,
        runner: PageRunner,
        shape: tuple[int, int],
        most_keys: int,
        memory: int,
        chunks: Sequence[int] = (),
    ) -> Pass:
        """Random ids behind `most_keys` cached tokens or fewer, in a cache of `memory` tokens.

        `shape`: rows and width. `chunks`: tokens that the first rows read instead.
        """
        rows, width = shape
        generator = torch.Generator().manual_seed(rows)
        start = torch.randint(1, most_keys, (rows,), generator=generator).numpy()
        tokens = torch.randint(runner.vocab_size, (rows, width), generator=generator)
        cache = runner.open_cache((0,), memory, rows)
        cache.make_room([[most_keys] for _ in start], width)
        prompts = [
            torch.randint(runner.vocab_size, (count,), generator=generator).tolist()
            for count in chunks
        ]
        read = [Chunk(row, 0, ids) for row, ids in enumerate(prompts)]
        return cls(runner, cache, tokens.to(runner.device), start, read)

    def __call__(self) -> Tensor:
        """Logits [rows, width, vocab] of the rows that decode."""
        idle = range(len(self.chunks))
        done = self.runner.forward(self.cache, self.tokens, self.start, idle, self.chunks)
        return done.logits[len(idle) :]

    def unpadded(self) -> Tensor:
        """The same by a pass that is launched kernel by kernel."""
        graphs = self.runner.graphs.pop(self.cache, None)
        try:
            return self()
        finally:
            if graphs is not None:
                self.runner.graphs[self.cache] = graphs

    def record(self) -> Tensor:
        """Logits of an eager pass, after which calls replay a graph, where any are recorded."""
        eager = self().clone()
        for _ in range(RECORD_AT):
            self()
        return eager

    def close(self) -> None:
        """Give back the cache and its graphs."""
        self.cache.release()
        self.runner.drop_caches()


def check_replay(one: Pass) -> int:
    """Graphs recorded. Raises AssertionError where a replay differs from the eager pass."""
    eager = one.record()
    recordings = one.runner.recorded_graphs()
    assert not recordings.off, recordings
    for _ in range(3):
        replayed = one()
        difference = float((replayed.float() - eager.float()).abs().max())
        same = torch.equal(replayed, eager)
        assert same, f"a replay of {tuple(one.tokens.shape)} differs by {difference}"
    return recordings.count


def check_padding(one: Pass) -> float:
    """How far a padded pass is from an unpadded one. Raises AssertionError where it is too far."""
    wanted = one.unpadded().double()
    difference = one().double() - wanted
    error = float(difference.square().mean().sqrt() / wanted.square().mean().sqrt())
    assert error <= ALLOWED[one.runner.model.dtype], f"a padded pass differs by {error:.2g}"
    return error


def milliseconds(forward: Callable[[], Tensor], device: torch.device) -> float:
    """Of one pass after another, the host's time included."""
    forward()
    _wait(device)
    started = time.perf_counter()
    for _ in range(TIMED):
        forward()
    _wait(device)
    return 1e3 * (time.perf_counter() - started) / TIMED


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_overlap(first: Pass, second: Pass, device: torch.device) -> None:
    """Raise AssertionError unless both at once give the bits of one after the other."""
    wanted = [each.record() for each in (first, second)]
    overlap = Overlap(device)
    for number in range(AT_ONCE):
        with overlap.beside():
            beside = second()
        found = [first(), beside]
        overlap.join()
        for role, mine, reference in zip(("first", "second"), found, wanted, strict=True):
            assert torch.equal(mine, reference), f"the {role} model differs in round {number}"
