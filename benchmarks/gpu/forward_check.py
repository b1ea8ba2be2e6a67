"""Forward passes of two loaded models: recorded against eager, and both at once against in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from optimal_sampling.engines.device import Overlap
from optimal_sampling.engines.local.paged.cuda_graphs import RECORD_AT
from optimal_sampling.engines.local.paged.page_cache import PageCache
from optimal_sampling.engines.local.paged.page_runner import PageRunner

__all__ = ["Pass", "check_overlap", "check_replay"]

AT_ONCE = 20
"""Rounds in which both models run at once."""


@dataclass(frozen=True, eq=False)
class Pass:
    """The same forward pass of one model, as often as it is called."""

    runner: PageRunner
    cache: PageCache
    tokens: Tensor
    start: np.ndarray

    @classmethod
    def of(cls, runner: PageRunner, rows: int, width: int, most_keys: int, memory: int) -> Pass:
        """Random ids behind `most_keys` cached tokens or fewer, in a cache of `memory` tokens."""
        generator = torch.Generator().manual_seed(rows)
        start = torch.randint(1, most_keys, (rows,), generator=generator).numpy()
        tokens = torch.randint(runner.vocab_size, (rows, width), generator=generator)
        cache = runner.open_cache((0,), memory, rows)
        cache.make_room([[most_keys] for _ in start], width)
        return cls(runner, cache, tokens.to(runner.device), start)

    def __call__(self) -> Tensor:
        """Logits [rows, width, vocab]."""
        return self.runner.forward(self.cache, self.tokens, self.start).logits

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
