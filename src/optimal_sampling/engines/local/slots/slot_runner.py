"""`SlotRunner`: one ragged forward pass of one model over rows that live in slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from optimal_sampling.engines.local.memory import round_up
from optimal_sampling.engines.local.runner import ForwardPass, ModelRunner
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.shapes import PLAIN, ShapeRules
from optimal_sampling.engines.local.slots.sdpa import ChunkGroup, Group, SlotPlan
from optimal_sampling.engines.local.slots.slot_cache import SlotCache
from optimal_sampling.engines.local.slots.slot_manager import SlotManager
from optimal_sampling.engines.local.streams import to_device

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
        positions = start[:, None] + np.arange(width)
        write = np.arange(rows)[:, None] * cache.manager.length + positions
        if len(idle):
            positions[list(idle)] = 0
            write[list(idle)] = cache.manager.scratch
        chunks = split_at(chunks, self.rules.kv_boundary)
        count = sum(len(c.ids) for c in chunks) + rows * width
        padding = self.rules.padded_tokens(count) - count
        dense, is_long = self._dense_groups(positions)
        plan = SlotPlan(
            cache=cache,
            write=self._tensor(flat_indices(chunks, padding, cache.manager, write.ravel())),
            padding=padding,
            chunks=self._chunk_groups(chunks, padding),
            dense=dense,
            is_long=is_long,
            query_multiple=self.rules.queries,
        )
        ids = tokens.reshape(-1)
        if chunks or padding:
            first = np.array([0] * padding + [i for c in chunks for i in c.ids])
            ids = torch.cat([self._tensor(first), ids])
        flat = flat_positions(chunks, padding, positions.ravel())
        logits = self.model(
            input_ids=ids[None],
            position_ids=self._tensor(self.mark_long(flat, chunks, padding))[None],
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
    ) -> tuple[tuple[Group, ...], Tensor | None]:
        """All rows in one group, or in two to select from: with short keys, and with long keys."""
        if not positions.size:
            return (), None
        where = self._tensor(positions)
        slots = slice(0, len(positions))
        boundary = self.rules.kv_boundary
        lengths = positions.max(1) + 1
        long = self.rules.kv_length(int(lengths.max()))
        group = Group(slots=slots, positions=where, length=long)
        if boundary is None or lengths.max() <= boundary or lengths.min() > boundary:
            return (group,), None
        is_long = lengths > boundary
        short = self.rules.kv_length(int(lengths[~is_long].max()))
        short_group = Group(slots=slots, positions=where, length=short)
        return (short_group, group), self._tensor(is_long)

    def _chunk_groups(self, chunks: Sequence[Chunk], first: int) -> tuple[ChunkGroup, ...]:
        """Chunks of similar length attend in one call. `chunks` are sorted by length."""
        groups = []
        while chunks:
            most = 2 * round_up(len(chunks[0].ids), 16)
            similar = [c for c in chunks if len(c.ids) <= most and self._same_class(c, chunks[0])]
            chunks = chunks[len(similar) :]
            groups.append(self._chunk_group(similar, first))
            first += sum(len(c.ids) for c in similar)
        return tuple(groups)

    def _same_class(self, a: Chunk, b: Chunk) -> bool:
        boundary = self.rules.kv_boundary
        return boundary is None or (a.start < boundary) == (b.start < boundary)

    def _chunk_group(self, chunks: Sequence[Chunk], first: int) -> ChunkGroup:
        """Shorter chunks repeat their last token up to the longest; `returns` drops the repeats."""
        counts = np.array([len(c.ids) for c in chunks])
        width = round_up(int(counts.max()), 16)
        within = np.minimum(np.arange(width), counts[:, None] - 1)
        offsets = first + np.concatenate([[0], np.cumsum(counts)[:-1]])
        starts = np.array([c.start for c in chunks])
        kept = np.arange(width) < counts[:, None]
        return ChunkGroup(
            slots=self._tensor(np.array([c.row for c in chunks])),
            positions=self._tensor(starts[:, None] + within),
            length=self.rules.kv_length(int((starts + counts).max())),
            queries=self._tensor(offsets[:, None] + within),
            returns=self._tensor(np.flatnonzero(kept.ravel())),
        )


def split_at(chunks: Sequence[Chunk], boundary: int | None) -> list[Chunk]:
    """Chunks cut at the boundary of key lengths; those with short keys first, each by length."""
    if boundary is None:
        return sorted(chunks, key=lambda c: len(c.ids))
    parts = []
    for chunk in chunks:
        cut = max(0, min(len(chunk.ids), boundary - chunk.start))
        if cut:
            parts.append(replace(chunk, ids=chunk.ids[:cut]))
        if cut < len(chunk.ids):
            parts.append(replace(chunk, start=chunk.start + cut, ids=chunk.ids[cut:]))
    return sorted(parts, key=lambda c: (c.start >= boundary, len(c.ids)))


def flat_positions(
    chunks: Sequence[Chunk], padding: int, dense: Int[np.ndarray, " dense"]
) -> Int[np.ndarray, " tokens"]:
    """Positions of all flat tokens in their texts."""
    if not chunks and not padding:
        return dense
    parts = [np.arange(c.start, c.start + len(c.ids)) for c in chunks]
    return np.concatenate([np.zeros(padding, dtype=np.int64), *parts, dense])


def flat_indices(
    chunks: Sequence[Chunk], padding: int, slots: SlotManager, dense: Int[np.ndarray, " dense"]
) -> Int[np.ndarray, " tokens"]:
    """Indices of the cache at which all flat tokens are stored."""
    if not chunks and not padding:
        return dense
    starts = [c.row * slots.length + c.start for c in chunks]
    parts = [np.arange(s, s + len(c.ids)) for s, c in zip(starts, chunks, strict=True)]
    return np.concatenate([np.full(padding, slots.scratch), *parts, dense])
