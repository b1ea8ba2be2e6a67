"""One ragged forward pass of one model: tokens of many rows in, logits of the dense rows out.

Knows slots and positions; knows nothing of requests, of the other model, or of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from optimal_sampling.engines.local.attention import AttentionPlan, Group, Plan
from optimal_sampling.engines.local.kv_cache import Cache, KVCache
from optimal_sampling.engines.local.scheduler import Chunk
from optimal_sampling.engines.local.shapes import PLAIN, ShapeRules, round_up
from optimal_sampling.engines.local.transfer import to_device

__all__ = ["ModelRunner"]


class ModelRunner:
    """A model with the shapes it is run in. The cache is an argument, so one model serves several runs."""

    def __init__(
        self, model: Any, vocab_size: int, rules: ShapeRules = PLAIN, bytes_per_token: int = 0
    ) -> None:
        self.model = model
        self.bytes_per_token = bytes_per_token
        """Of the KV cache, for one token of one slot."""
        self.vocab_size = vocab_size
        self.settled = True
        """Whether all passes since this was last set to True cost what such passes always will."""
        self.rules = rules
        self.device: torch.device = model.device
        self.embeddings: int = model.get_input_embeddings().weight.shape[0]

    def forward(
        self,
        cache: Cache,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        idle: Sequence[int] = (),
        chunks: Sequence[Chunk] = (),
    ) -> Float[Tensor, "rows width vocab"]:
        """Feed `tokens` to slots 0..rows-1 at positions start, start + 1, ...; before them, the chunks.

        Idle rows take part in the shape only: nothing of theirs is stored, and their logits mean nothing.
        Logits come in the model's dtype, cut to the shared vocabulary.
        """
        return self.forward_with_plan(cache, tokens, start, idle, chunks)[0]

    @torch.inference_mode()
    def forward_with_plan(
        self,
        cache: Cache,
        tokens: Int[Tensor, "rows width"],
        start: Int[np.ndarray, " rows"],
        idle: Sequence[int] = (),
        chunks: Sequence[Chunk] = (),
    ) -> tuple[Float[Tensor, "rows width vocab"], Plan | None]:
        """`forward`, and the plan, which tells which layers called the attention function."""
        assert isinstance(cache, KVCache)
        rows, width = tokens.shape
        positions = start[:, None] + np.arange(width)
        write = np.arange(rows)[:, None] * cache.length + positions
        if len(idle):
            positions[list(idle)] = 0
            write[list(idle)] = cache.scratch
        chunks = split_at(chunks, self.rules.kv_boundary)
        count = sum(len(c.ids) for c in chunks) + rows * width
        padding = self.rules.padded_tokens(count) - count
        dense, is_long = self._dense_groups(positions)
        plan = AttentionPlan(
            cache=cache,
            write=self._tensor(flatten_chunks(chunks, padding, cache, write.ravel(), "write")),
            padding=padding,
            chunks=self._chunk_groups(chunks, padding),
            dense=dense,
            is_long=is_long,
            query_multiple=self.rules.queries,
        )
        ids = tokens.reshape(-1)
        if chunks or padding:
            ids = torch.cat(
                [self._tensor(np.array([0] * padding + [i for c in chunks for i in c.ids])), ids]
            )
        keep = self.rules.padded_tokens(rows * width)
        logits = self.model(
            input_ids=ids[None],
            position_ids=self._tensor(
                flatten_chunks(chunks, padding, cache, positions.ravel(), "position")
            )[None],
            use_cache=False,
            plan=plan,
            logits_to_keep=keep,
        ).logits
        return logits[0, -rows * width :, : self.vocab_size].unflatten(0, (rows, width)), plan

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.device)

    def _dense_groups(
        self, positions: Int[np.ndarray, "rows width"]
    ) -> tuple[tuple[Group, ...], Tensor | None]:
        """The rows at once; where some see short and some long keys, all rows twice, to be selected from."""
        if not positions.size:
            return (), None
        where = self._tensor(positions)
        slots = slice(0, len(positions))
        boundary = self.rules.kv_boundary
        lengths = positions.max(1) + 1
        if boundary is None or lengths.max() <= boundary or lengths.min() > boundary:
            return (Group(slots, where, self.rules.kv_length(int(lengths.max()))),), None
        is_long = lengths > boundary
        short = self.rules.kv_length(int(lengths[~is_long].max()))
        long = self.rules.kv_length(int(lengths.max()))
        return (Group(slots, where, short), Group(slots, where, long)), self._tensor(is_long)

    def _chunk_groups(self, chunks: Sequence[Chunk], first: int) -> tuple[Group, ...]:
        """Chunks of similar length attend in one call. `chunks` come sorted by length, as in the flat tokens."""
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

    def _chunk_group(self, chunks: Sequence[Chunk], first: int) -> Group:
        """Shorter chunks repeat their last token up to the longest; `returns` drops the repeats."""
        counts = np.array([len(c.ids) for c in chunks])
        width = round_up(int(counts.max()), 16)
        within = np.minimum(np.arange(width), counts[:, None] - 1)
        offsets = first + np.concatenate([[0], np.cumsum(counts)[:-1]])
        starts = np.array([c.start for c in chunks])
        kept = np.arange(width) < counts[:, None]
        return Group(
            slots=self._tensor(np.array([c.slot for c in chunks])),
            positions=self._tensor(starts[:, None] + within),
            length=self.rules.kv_length(int((starts + counts).max())),
            queries=self._tensor(offsets[:, None] + within),
            returns=self._tensor(np.flatnonzero(kept.ravel())),
        )


def split_at(chunks: Sequence[Chunk], boundary: int | None) -> list[Chunk]:
    """Chunks cut where keys go from short to long; short-key chunks first, each kind sorted by length."""
    parts = []
    for chunk in chunks:
        cut = (
            len(chunk.ids)
            if boundary is None
            else max(0, min(len(chunk.ids), boundary - chunk.start))
        )
        for start, ids in ((chunk.start, chunk.ids[:cut]), (chunk.start + cut, chunk.ids[cut:])):
            if ids:
                parts.append(Chunk(chunk.slot, start, ids))
    return sorted(parts, key=lambda c: (boundary is not None and c.start >= boundary, len(c.ids)))


def flatten_chunks(
    chunks: Sequence[Chunk],
    padding: int,
    cache: KVCache,
    dense: Int[np.ndarray, " tokens"],
    what: str,
) -> Int[np.ndarray, " tokens"]:
    """Positions, or flat cache indices, of padding, chunks and dense tokens in flat order."""
    if not chunks and not padding:
        return dense
    parts = [np.full(padding, cache.scratch if what == "write" else 0)]
    for chunk in chunks:
        base = chunk.start + (chunk.slot * cache.length if what == "write" else 0)
        parts.append(np.arange(base, base + len(chunk.ids)))
    return np.concatenate([*parts, dense])
