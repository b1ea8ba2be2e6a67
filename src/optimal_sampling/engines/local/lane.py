"""One model with its cache, and the contexts of every row that live in it."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.forward import ModelRunner
from optimal_sampling.engines.local.kv_cache import KVCache
from optimal_sampling.engines.local.scheduler import CacheSpec, Chunk, Round, Sequence

__all__ = ["Lane"]


class Lane:
    """One model with its cache, and the contexts of every row that live in it."""

    def __init__(self, runner: ModelRunner, contexts: tuple[int, ...], bytes_per_token: int) -> None:
        self.runner = runner
        self.contexts = contexts
        self.cache = KVCache()
        self.spec = CacheSpec(contexts, bytes_per_token)

    def bytes_with(self, rows: int, length: int) -> int:
        """Memory of the cache with room for this many rows of this length."""
        return rows * len(self.contexts) * length * self.spec.bytes_per_token

    def holds(self, rows: int, length: int) -> bool:
        """Whether the cache has this room already."""
        return rows * len(self.contexts) <= self.cache.slots and length <= self.cache.length

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
        idle = [row * width + i for row, ready in enumerate(plan.ready) if not ready for i in range(width)]
        start = np.array([s.known(c) - 1 + offset for s in rows for c in self.contexts])
        tokens = drafts.repeat_interleave(width, 0) if width > 1 else drafts
        chunks: list[Chunk] = []
        if offset == 0:
            last = torch.tensor([[s.last(c)] for s in rows for c in self.contexts], device=drafts.device)
            tokens = torch.cat([last, tokens], 1)
            pairs = [(i, chunk) for i, context in enumerate(self.contexts) for chunk in plan.chunks[context]]
            chunks = [Chunk(chunk.slot * width + i, chunk.start, chunk.ids) for i, chunk in pairs]
        logits = self.runner.forward(self.cache, tokens, start, idle, chunks)
        return [logits[i::width] for i in range(width)]
