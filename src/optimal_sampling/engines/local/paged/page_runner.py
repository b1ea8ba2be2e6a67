"""`PageRunner`: one ragged forward pass of one model over rows that live in pages.

Passes are padded to few shapes, so that each can be a recorded CUDA graph: rows to the next of
ROWS, widths to the next of WIDTHS, prompt chunks to the next of BUCKETS, keys to a power of two.
Padding rows are idle rows. What no bucket holds is launched kernel by kernel.
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

from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.local.memory import round_up
from optimal_sampling.engines.local.paged.attention_backends import Backend, PagePlan
from optimal_sampling.engines.local.paged.cuda_graphs import CudaRecorder, Graphs, Recorder
from optimal_sampling.engines.local.paged.fused_decoder import FusedDecoder
from optimal_sampling.engines.local.paged.padding import (
    BUCKETS,
    NO_CHUNKS,
    Bucket,
    bucket_for,
    pad_chunks,
    rounded_keys,
)
from optimal_sampling.engines.local.paged.page_cache import Batch, BatchShape, PageCache, lay_out
from optimal_sampling.engines.local.paged.page_manager import PAGE, PageManager
from optimal_sampling.engines.local.runner import ForwardPass, ModelRunner, Recordings
from optimal_sampling.engines.local.scheduler import Chunk

__all__ = ["GATHER", "SLOW_GATHER", "PageRunner"]

WIDTHS = (1, 2, 3, 5, 9, 17)
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
GATHER = 1 / 16
"""Share of the rows that are admitted together where rounds are recorded.

With c the rounds that a round with prompt tokens lasts beyond its own, a share s of R rows and
texts of L tokens, s / 2 of the rows wait and c R / (s R L) of the time is lost: least at
s = sqrt(2 c / L), which is 0.08 at c = 1 and L = 300, and flat around it.
"""
SLOW_GATHER = 1 / 8
"""That where nothing can be recorded any more: 0.22 at c = 7."""
START_KEYS = (512, 1024)
"""Keys of the shapes that are recorded before the first round, at the full batch."""
START_BUCKET = BUCKETS[1]
"""Chunks of a further one."""


def next_of(sizes: Sequence[int], value: int) -> int:
    """The first of `sizes` that is large enough, else a multiple of the largest."""
    return next((size for size in sizes if size >= value), round_up(value, sizes[-1]))


class PageRunner(ModelRunner[PageCache]):
    """A model with its attention backend, and released caches with the graphs recorded on them."""

    def __init__(
        self,
        model: Any,
        vocab_size: int,
        bytes_per_token: int,
        backend: Backend,
        fused: bool = False,
    ) -> None:
        super().__init__(model, vocab_size, bytes_per_token)
        self.backend = backend
        self.decoder = FusedDecoder(model) if fused else None
        config = model.config.get_text_config()
        self.longest: int = getattr(config, "max_position_embeddings", None) or sys.maxsize
        self.new_recorder: Callable[[], Recorder] | None = (
            CudaRecorder if self.device.type == "cuda" else None
        )
        self.runs_ahead = self.device.type == "cuda"
        self.graphs: dict[PageCache, Graphs] = {}
        self.released: list[PageCache] = []

    def open_cache(self, contexts: tuple[int, ...], tokens: int, sequences: int) -> PageCache:
        """A cache of `tokens` tokens, one page of which is scratch: an earlier run's, or a new one.

        Released caches of other sizes are freed.
        """
        manager = PageManager(contexts, self.bytes_per_token, max(0, tokens // PAGE - 1))
        fitting = [cache for cache in self.released if cache.pages == manager.pages][:1]
        self.drop_caches(kept=fitting)
        if fitting:
            fitting[0].manager = manager
            return fitting[0]
        cache = PageCache(manager, self.released)
        if self.new_recorder is not None:
            recorder = self.new_recorder()
            self.graphs[cache] = Graphs(lambda batch: self._run(cache, batch)[0], recorder)
        return cache

    def drop_caches(self, kept: Sequence[PageCache] = ()) -> None:
        """Free released caches and the graphs recorded on them."""
        for cache in self.released:
            if cache not in kept:
                self.graphs.pop(cache, None)
                cache.free()
        self.released.clear()

    @property
    def gather(self) -> float:  # type: ignore[override]
        """Rounds with prompt tokens take longer than others, most of all where none is recorded."""
        if self.new_recorder is None:
            return 0.0
        return SLOW_GATHER if self.recorded_graphs().off else GATHER

    def recorded_graphs(self) -> Recordings:
        """Over all caches."""
        return sum((graphs.recordings for graphs in self.graphs.values()), Recordings())

    @torch.inference_mode()
    def prepare(self, cache: PageCache, rows: int, widest: int) -> None:
        """Record passes over so many rows, all of them idle, for texts of START_KEYS tokens.

        A graph serves other numbers than it was recorded with, and the first pass of all, which
        cannot be recorded, is not a round's.
        """
        graphs = self.graphs.get(cache)
        if graphs is None:
            return
        rows = next_of(ROWS, rows)
        start = np.zeros(rows, dtype=np.int64)
        for width in (each for each in WIDTHS if each <= next_of(WIDTHS, widest)):
            unpadded = lay_out(cache.manager, start, width, range(rows), ())
            for bucket, keys in self._first_shapes():
                numbers, shape = pad_chunks(*unpadded, bucket)
                ids = torch.zeros(shape.tokens, dtype=torch.int64, device=self.device)
                given = replace(shape, max_keys=keys)
                graphs.prepare(Batch(given, ids, to_device(numbers, self.device)))

    def _first_shapes(self) -> list[tuple[Bucket, int]]:
        """Chunks and keys of what `prepare` records."""
        longest = rounded_keys(self.longest)
        plain = [(NO_CHUNKS, keys) for keys in START_KEYS if keys <= longest]
        return [*plain, (START_BUCKET, rounded_keys(1, START_BUCKET.segments))]

    @torch.inference_mode()
    def forward(
        self,
        cache: PageCache,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        idle: Sequence[int] = (),
        chunks: Sequence[Chunk] = (),
    ) -> ForwardPass:
        """From a recorded graph where there is one. Chunks that no bucket holds have none."""
        rows, width = tokens.shape
        if cache not in self.graphs:
            numbers, shape = lay_out(cache.manager, start, width, idle, chunks)
            numbers[: shape.tokens] = self.mark_long(numbers[: shape.tokens], chunks)
            ids = self._with_chunks(tokens, chunks)
            logits, plan = self._run(cache, Batch(shape, ids, to_device(numbers, self.device)))
            return ForwardPass(self._cut(logits, rows, width, width), plan=plan)
        bucket = bucket_for(chunks)
        batch, padded_width = self._padded(cache, tokens, start, idle, chunks, bucket)
        if bucket is None:
            logits, plan = self._run(cache, batch)
            return ForwardPass(self._cut(logits, rows, width, padded_width), plan=plan)
        logits, settled = self._recorded(cache, batch)
        return ForwardPass(self._cut(logits, rows, width, padded_width), settled)

    @torch.inference_mode()
    def forward_behind(
        self,
        cache: PageCache,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        behind: Int[Tensor, " rows"],
    ) -> ForwardPass:
        """All is laid out as for the longest texts, and set back on the device."""
        batch, padded_width = self._padded(cache, tokens, start, (), (), NO_CHUNKS)
        batch.set_back(behind)
        logits, settled = self._recorded(cache, batch)
        rows, width = tokens.shape
        return ForwardPass(self._cut(logits, rows, width, padded_width), settled)

    def _recorded(
        self, cache: PageCache, batch: Batch
    ) -> tuple[Float[Tensor, "outputs vocab"], bool]:
        """Logits, from a recorded graph where there is one, and whether the pass was settled."""
        graphs = self.graphs.get(cache)
        if graphs is None:
            return self._run(cache, batch)[0], True
        settled = graphs.settled(batch.shape)
        return graphs(batch), settled

    def _with_chunks(
        self, tokens: Int[Tensor, "rows width"], chunks: Sequence[Chunk], padded: int = 0
    ) -> Int[Tensor, " tokens"]:
        """Ids of a pass; `padded`: tokens of the chunks, surplus ones included."""
        if not chunks:
            return tokens.reshape(-1)
        ids = [i for chunk in chunks for i in chunk.ids]
        ids += [0] * (padded - len(ids))
        return torch.cat([to_device(np.array(ids), self.device), tokens.reshape(-1)])

    def _padded(
        self,
        cache: PageCache,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        idle: Sequence[int],
        chunks: Sequence[Chunk],
        bucket: Bucket | None,
    ) -> tuple[Batch, int]:
        """The batch with rows, width, chunks and keys rounded up, and its width.

        Without a bucket the chunks stay as they are; Triton's programs are compiled for the rest.
        What surplus columns write lies behind the row's end, and is overwritten.
        """
        rows, width = tokens.shape
        padded_width = self._padded_width(cache, start, width)

        def lay_out_rows(count: int) -> tuple[Int[np.ndarray, " numbers"], BatchShape]:
            padded = np.pad(start, (0, count - rows))
            not_used = [*idle, *range(rows, count)]
            numbers, shape = lay_out(cache.manager, padded, padded_width, not_used, chunks)
            numbers[: shape.tokens] = self.mark_long(numbers[: shape.tokens], chunks)
            if bucket is not None:
                numbers, shape = pad_chunks(numbers, shape, bucket)
            return numbers, replace(shape, max_keys=rounded_keys(shape.max_keys, shape.chunks))

        numbers, shape = lay_out_rows(next_of(ROWS, rows))
        graphs = self.graphs.get(cache)
        stand_in = None if graphs is None or bucket is None else graphs.stand_in(shape)
        if stand_in is not None:
            numbers, _ = lay_out_rows(stand_in.rows)
            shape = stand_in
        tokens = F.pad(tokens, (0, padded_width - width, 0, shape.rows - rows))
        ids = self._with_chunks(tokens, chunks, bucket.tokens if bucket else 0)
        return Batch(shape, ids, to_device(numbers, self.device)), padded_width

    def _padded_width(self, cache: PageCache, start: Int[np.ndarray, " rows"], width: int) -> int:
        """The next of WIDTHS; `width` where a row's pages or the model's positions end before."""
        wanted = next_of(WIDTHS, width)
        ends = np.minimum(cache.manager.rooms[: len(start)], self.longest)
        return wanted if (start + wanted <= ends).all() else width

    def _run(
        self, cache: PageCache, batch: Batch
    ) -> tuple[Float[Tensor, "outputs vocab"], PagePlan]:
        plan = PagePlan(cache, batch, self.backend)
        if self.decoder is not None:
            return self.decoder(batch.ids, plan), plan
        logits = self.model(
            input_ids=batch.ids[None],
            position_ids=plan.positions[None],
            use_cache=False,
            plan=plan,
            logits_to_keep=batch.shape.outputs,
        ).logits
        return logits[0, -batch.shape.outputs :], plan

    def _cut(
        self, logits: Tensor, rows: int, width: int, padded_width: int
    ) -> Float[Tensor, "rows width vocab"]:
        return logits.view(-1, padded_width, logits.shape[-1])[:rows, :width, : self.vocab_size]
