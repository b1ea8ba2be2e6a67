"""`SlotRunner`: one ragged forward pass of one model over rows that live in slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from optimal_sampling.engines.device import to_device
from optimal_sampling.engines.local.layers import PLAIN, ShapeRules
from optimal_sampling.engines.local.memory import SlotManager, round_up
from optimal_sampling.engines.local.runner import ForwardPass, ModelRunner
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.slots.slot_attention import (
    ChunkGroup,
    Group,
    SlotCache,
    SlotPlan,
)

__all__ = ["SlotRunner"]


class SlotRunner(ModelRunner[SlotCache]):
    """A model with the shapes that it is run in."""

    def __init__(
        self, model: Any, vocab_size: int, bytes_per_token: int = 0, rules: ShapeRules = PLAIN
    ) -> None:
        super().__init__(model, vocab_size, bytes_per_token)
        self.rules = rules
        self.kv_boundary = rules.kv_boundary

    def open_cache(self, contexts: tuple[int, ...], tokens: int, sequences: int) -> SlotCache:
        """Slots are made as they are needed, so `tokens` does not matter."""
        manager = SlotManager(contexts, self.bytes_per_token, self.rules.slot_length, sequences)
        return SlotCache(manager)

    @torch.inference_mode()
    def forward(
        self,
        cache: SlotCache,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        idle: Sequence[int] = (),
        chunks: Sequence[Chunk] = (),
    ) -> ForwardPass:
        """The flat row is padding, chunks, then `width` tokens of every row."""
        rows, width = tokens.shape
        length, scratch = cache.manager.length, cache.manager.tokens - 1
        positions = start[:, None] + np.arange(width)
        write = np.arange(rows)[:, None] * length + positions
        if len(idle):
            positions[list(idle)] = 0
            write[list(idle)] = scratch
        dense, is_long = self._dense_groups(positions)
        ids, positions, write = tokens.reshape(-1), positions.ravel(), write.ravel()
        chunks = split_at(chunks, self.rules.kv_boundary)
        count = sum(len(c.ids) for c in chunks) + rows * width
        padding = self.rules.padded_tokens(count) - count
        if chunks or padding:
            first = np.array([0] * padding + [i for c in chunks for i in c.ids])
            ids = torch.cat([self._tensor(first), ids])
            starts = [c.start for c in chunks]
            positions = flat(chunks, starts, np.zeros(padding, dtype=np.int64), positions)
            starts = [c.row * length + c.start for c in chunks]
            write = flat(chunks, starts, np.full(padding, scratch), write)
        plan = SlotPlan(
            cache=cache,
            write=self._tensor(write),
            padding=padding,
            chunks=self._chunk_groups(chunks, padding),
            dense=dense,
            is_long=is_long,
            query_multiple=self.rules.queries,
        )
        logits = self.model(
            input_ids=ids[None],
            position_ids=self._tensor(self.mark_long(positions, chunks, padding))[None],
            use_cache=False,
            plan=plan,
            logits_to_keep=self.rules.padded_tokens(rows * width),
        ).logits
        kept = logits[0, -rows * width :, : self.vocab_size].unflatten(0, (rows, width))
        return ForwardPass(kept, plan=plan)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)

    def _dense_groups(
        self, positions: Int[np.ndarray, "rows width"]
    ) -> tuple[list[Group], Tensor | None]:
        """All rows in one group, or in two to select from: with short keys, and with long keys."""
        if not positions.size:
            return [], None
        where = self._tensor(positions)
        lengths = positions.max(1) + 1
        longest = int(lengths.max())
        group = self._group(where, longest)
        boundary = self.rules.kv_boundary
        if longest <= boundary or lengths.min() > boundary:
            return [group], None
        is_long = lengths > boundary
        short = int(lengths[~is_long].max())
        return [self._group(where, short), group], self._tensor(is_long)

    def _group(self, positions: Int[Tensor, "rows width"], longest: int) -> Group:
        slots = slice(0, positions.shape[0])
        return Group(slots=slots, positions=positions, length=self.rules.kv_length(longest))

    def _chunk_groups(self, chunks: Sequence[Chunk], first: int) -> list[ChunkGroup]:
        """Chunks of similar length attend in one call. `chunks` are sorted by length."""
        groups = []
        while chunks:
            most = 2 * round_up(len(chunks[0].ids), 16)
            is_long = self._is_long(chunks[0])
            similar = [c for c in chunks if len(c.ids) <= most and self._is_long(c) == is_long]
            chunks = chunks[len(similar) :]
            groups.append(self._chunk_group(similar, first))
            first += sum(len(c.ids) for c in similar)
        return groups

    def _is_long(self, chunk: Chunk) -> bool:
        return chunk.start >= self.rules.kv_boundary

    def _chunk_group(self, chunks: Sequence[Chunk], first: int) -> ChunkGroup:
        """Shorter chunks repeat their last token up to the longest; `returns` drops the repeats."""
        counts = np.array([len(c.ids) for c in chunks])
        columns = np.arange(round_up(int(counts.max()), 16))
        within = np.minimum(columns, counts[:, None] - 1)
        offsets = first + np.cumsum(counts) - counts
        starts = np.array([c.start for c in chunks])
        kept = columns < counts[:, None]
        return ChunkGroup(
            slots=self._tensor(np.array([c.row for c in chunks])),
            positions=self._tensor(starts[:, None] + within),
            length=self.rules.kv_length(int((starts + counts).max())),
            queries=self._tensor(offsets[:, None] + within),
            returns=self._tensor(np.flatnonzero(kept)),
        )


def split_at(chunks: Sequence[Chunk], boundary: int) -> list[Chunk]:
    """Chunks cut at the boundary of key lengths; those with short keys first, each by length."""
    parts = []
    for chunk in chunks:
        cut = max(0, min(len(chunk.ids), boundary - chunk.start))
        if cut:
            parts.append(replace(chunk, ids=chunk.ids[:cut]))
        if cut < len(chunk.ids):
            parts.append(replace(chunk, start=chunk.start + cut, ids=chunk.ids[cut:]))
    return sorted(parts, key=lambda c: (c.start >= boundary, len(c.ids)))


def flat(
    chunks: Sequence[Chunk],
    starts: Sequence[int],
    padding: Int[np.ndarray, " padding"],
    dense: Int[np.ndarray, " dense"],
) -> Int[np.ndarray, " tokens"]:
    """One number per flat token: padding, `start`, `start + 1`, ... of each chunk, then `dense`."""
    parts = [np.arange(s, s + len(c.ids)) for s, c in zip(starts, chunks, strict=True)]
    return np.concatenate([padding, *parts, dense])
