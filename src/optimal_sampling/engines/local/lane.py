"""One model with its cache, and the contexts of every row that live in it."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.forward import ModelRunner
from optimal_sampling.engines.local.kv_cache import Cache, KVCache
from optimal_sampling.engines.local.paged.cache import PagedCache
from optimal_sampling.engines.local.paged.forward import PagedRunner
from optimal_sampling.engines.local.scheduler import CacheSpec, Chunk, Round, Sequence
from optimal_sampling.engines.local.transfer import to_device

__all__ = ["Lane", "grow_slots"]


class Lane:
    """One model with its cache, and the contexts of every row that live in it."""

    def __init__(
        self, runner: ModelRunner, contexts: tuple[int, ...], pages: int | None = None
    ) -> None:
        self.runner = runner
        self.contexts = contexts
        self.spec = CacheSpec(contexts, runner.bytes_per_token)
        self.cache: Cache = KVCache()
        if pages is not None:
            assert isinstance(runner, PagedRunner)
            self.cache = runner.borrow_cache(pages)

    def make_room(self, rows: list[Sequence], width: int) -> None:
        """Pages for every row's text and `width` more tokens."""
        assert isinstance(self.cache, PagedCache)
        self.cache.reserve([s.known(context) + width for s in rows for context in self.contexts])

    def close(self) -> None:
        """Let go of the cache."""
        if isinstance(self.cache, PagedCache):
            assert isinstance(self.runner, PagedRunner)
            self.runner.return_cache(self.cache)
            self.cache = KVCache()  # whoever keeps the run is not to keep its memory
        elif isinstance(self.cache, KVCache):
            self.cache.reshape(0, 0)

    def move(self, source: int, target: int, rows: list[Sequence]) -> None:
        """Copy a row's contexts to another row's slots."""
        width = len(self.contexts)
        for i, context in enumerate(self.contexts):
            self.cache.move(source * width + i, target * width + i, rows[target].cached[context])

    def clear(self, row: int) -> None:
        """Zero a row's slots."""
        for i in range(len(self.contexts)):
            self.cache.clear(row * len(self.contexts) + i)

    def forward(
        self, plan: Round, rows: list[Sequence], drafts: Int[Tensor, "rows drafts"], offset: int = 0
    ) -> list[Float[Tensor, "rows width vocab"]]:
        """Logits per context after each row's last known token and its drafts.

        With an `offset` the last known token and `offset - 1` drafts are cached already: feed `drafts` after them.
        """
        width = len(self.contexts)
        idle = [
            row * width + i
            for row, ready in enumerate(plan.ready)
            if not ready
            for i in range(width)
        ]
        start = np.array([s.known(c) - 1 + offset for s in rows for c in self.contexts])
        tokens = drafts.repeat_interleave(width, 0) if width > 1 else drafts
        chunks: list[Chunk] = []
        if offset == 0:
            last = to_device(
                np.array([[s.last(c)] for s in rows for c in self.contexts]), drafts.device
            )
            tokens = torch.cat([last, tokens], 1)
            pairs = [
                (i, chunk)
                for i, context in enumerate(self.contexts)
                for chunk in plan.chunks[context]
            ]
            chunks = [Chunk(chunk.slot * width + i, chunk.start, chunk.ids) for i, chunk in pairs]
        logits = self.runner.forward(self.cache, tokens, start, idle, chunks)
        return [logits[i::width] for i in range(width)]


def grow_slots(lanes: list[Lane], slots: int, lengths: tuple[int, ...], memory: int) -> None:
    """Room for `slots` rows of these lengths in caches of slots, which grow and do not shrink.

    Where growing alone would exceed `memory`, all of them take the wanted shape.
    """

    def of(lane: Lane) -> tuple[KVCache, int]:
        assert isinstance(lane.cache, KVCache)
        return lane.cache, slots * len(lane.contexts)

    wanted = [
        (*of(lane), length, lane.spec.bytes_per_token)
        for lane, length in zip(lanes, lengths, strict=True)
    ]
    small = [w for w in wanted if w[1] > w[0].slots or w[2] > w[0].length]
    if not small:
        return
    total = sum(count * length * bytes_ for _, count, length, bytes_ in small)
    total += sum(w[0].slots * w[0].length * w[3] for w in wanted if w not in small)
    for cache, count, length, _ in small if total <= memory else wanted:
        cache.reshape(count, length)
