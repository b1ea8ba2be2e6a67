"""`PagedRunner`: one ragged forward pass of one model over rows that live in pages.

Rounds without prompt tokens are padded to few shapes, so that each can be a recorded CUDA graph: rows to the next of
ROWS, widths to the next of WIDTHS, keys to a power of two. Padding rows are idle rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.attention import Plan
from optimal_sampling.engines.local.forward import ModelRunner
from optimal_sampling.engines.local.kv_cache import Cache
from optimal_sampling.engines.local.paged.cache import PAGE, PagedCache
from optimal_sampling.engines.local.paged.graphs import CudaRecorder, Graphs, Recorder
from optimal_sampling.engines.local.paged.kernels import Kernel, PagedPlan
from optimal_sampling.engines.local.paged.layout import Batch, lay_out
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.transfer import to_device

__all__ = ["PagedRunner"]

WIDTHS = (1, 2, 3, 5, 9, 17)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LEAST_KEYS = 512


def next_of(sizes: Sequence[int], value: int) -> int:
    """The first of `sizes` that is large enough, else a multiple of the largest."""
    return next((size for size in sizes if size >= value), -(-value // sizes[-1]) * sizes[-1])


class PagedRunner(ModelRunner):
    """A model, the kernel it attends with, and caches that are not in use, with the graphs recorded over them."""

    def __init__(
        self, model: Any, vocab_size: int, kernel: Kernel, bytes_per_token: int = 0
    ) -> None:
        super().__init__(model, vocab_size, bytes_per_token=bytes_per_token)
        self.kernel = kernel
        self.longest: int = (
            getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        )
        self.new_recorder: Callable[[], Recorder] | None = (
            CudaRecorder if self.device.type == "cuda" else None
        )
        self.graphs: dict[PagedCache, Graphs] = {}
        self._idle: list[PagedCache] = []

    def borrow_cache(self, pages: int) -> PagedCache:
        """A cache of this size, with nothing in it; give it back to `return_cache`."""
        for cache in self._idle:
            if cache.pages == pages:
                self._idle.remove(cache)
                return cache
        cache = PagedCache(pages)
        if self.new_recorder is not None:
            self.graphs[cache] = Graphs(
                lambda batch: self._run(cache, batch)[0], self.new_recorder()
            )
        return cache

    def return_cache(self, cache: PagedCache) -> None:
        """Its rows are freed; its memory is kept for the next run of the same size."""
        cache.free()
        self._idle.append(cache)

    def drop_caches(self, keep: int | None = None) -> None:
        """Free the memory of caches that are not in use, but for one of `keep` pages."""
        kept = [cache for cache in self._idle if cache.pages == keep][:1]
        for cache in self._idle:
            if cache not in kept:
                self.graphs.pop(cache, None)
        self._idle = kept

    @torch.inference_mode()
    def forward_with_plan(
        self,
        cache: Cache,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        idle: Sequence[int] = (),
        chunks: Sequence[Chunk] = (),
    ) -> tuple[Float[Tensor, "rows width vocab"], Plan | None]:
        """As `ModelRunner` does it. There is no plan to show where a recorded graph ran."""
        assert isinstance(cache, PagedCache)
        rows, width = tokens.shape
        if chunks or cache not in self.graphs:
            numbers, shape = lay_out(cache, start, width, idle, chunks)
            ids = tokens.reshape(-1)
            if chunks:
                ids = torch.cat(
                    [to_device(np.array([i for c in chunks for i in c.ids]), self.device), ids]
                )
            logits, plan = self._run(cache, Batch(shape, ids, to_device(numbers, self.device)))
            return self._cut(logits, rows, width, width), plan
        batch, padded_width = self._padded(cache, tokens, start, idle)
        self.settled &= self.graphs[cache].settled(batch.shape)
        logits = self.graphs[cache](batch)
        return self._cut(logits, rows, width, padded_width), None

    def _padded(
        self,
        cache: PagedCache,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        idle: Sequence[int],
    ) -> tuple[Batch, int]:
        """Rows, width and keys rounded up. What surplus columns write lies behind the row's end, and is overwritten."""
        rows, width = tokens.shape
        more_rows = next_of(ROWS, rows) - rows
        padded_width = self._room(cache, start, width)
        ids = F.pad(tokens, (0, padded_width - width, 0, more_rows)).reshape(-1)
        idle = [*idle, *range(rows, rows + more_rows)]
        numbers, shape = lay_out(cache, np.pad(start, (0, more_rows)), padded_width, idle, ())
        shape = replace(shape, max_keys=max(LEAST_KEYS, 1 << (shape.max_keys - 1).bit_length()))
        return Batch(shape, ids, to_device(numbers, self.device)), padded_width

    def _room(self, cache: PagedCache, start: Int[np.ndarray, " rows"], width: int) -> int:
        """The padded width, unless some row's pages, or the model's positions, end before it."""
        wanted = next_of(WIDTHS, width)
        ends = [min(run.pages * PAGE, self.longest) for run in cache.runs.rows[: len(start)]]
        return (
            wanted
            if all(first + wanted <= end for first, end in zip(start, ends, strict=True))
            else width
        )

    def _run(
        self, cache: PagedCache, batch: Batch
    ) -> tuple[Float[Tensor, "outputs vocab"], PagedPlan]:
        plan = PagedPlan(cache, batch, self.kernel)
        logits = self.model(
            input_ids=batch.ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            plan=plan,
            logits_to_keep=batch.shape.outputs,
        ).logits
        return logits[0, -batch.shape.outputs :], plan

    def _cut(
        self, logits: Tensor, rows: int, width: int, padded_width: int
    ) -> Float[Tensor, "rows width vocab"]:
        return logits.view(-1, padded_width, logits.shape[-1])[:rows, :width, : self.vocab_size]
