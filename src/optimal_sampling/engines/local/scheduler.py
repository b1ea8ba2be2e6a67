"""Who runs next: admission, memory, preemption, prompt chunks. Plain Python; knows nothing of tensors.

A sequence has one *context* per model: its own prompt, then the common output. In every cache the contexts of the
running sequences occupy dense slots, so that decoding reads views and never gathers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from optimal_sampling.types import Request

__all__ = ["CacheSpec", "Chunk", "Limits", "Round", "Scheduler", "Sequence"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on its way: what has been drawn, and how much of it each cache holds."""

    request: Request
    prompts: tuple[tuple[int, ...], ...]
    """Prompt ids, one tuple per context."""
    output: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    """Per context, the number of leading tokens whose keys and values are in the cache."""
    trace: list[Any] = field(default_factory=list)
    captured: list[Any] = field(default_factory=list)
    lookup: Any = None
    """Drafts by lookup in this text, where the run drafts so."""
    order: int = 0
    """Number of its (first) admission; the latest is preempted first."""
    started: float = field(default_factory=time.perf_counter)

    def known(self, context: int) -> int:
        """Number of tokens known so far: prompt and output."""
        return len(self.prompts[context]) + len(self.output)

    def pending(self, context: int) -> int:
        """Known tokens still to be cached before this context can decode. The last one is fed by decoding."""
        return self.known(context) - 1 - self.cached[context]

    def last(self, context: int) -> int:
        """The last known token, which is fed to decode the next one."""
        return self.output[-1] if self.output else self.prompts[context][-1]

    def tokens(self, context: int, start: int, count: int) -> list[int]:
        """`count` known token ids from position `start`."""
        prompt = self.prompts[context]
        head = prompt[start : start + count]
        tail = self.output[max(0, start - len(prompt)) : max(0, start + count - len(prompt))]
        return [*head, *tail]

    def evict(self) -> None:
        """Forget what the caches hold. The output stays, and is recomputed as if it were prompt."""
        self.cached = [0] * len(self.prompts)


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One model's cache: which contexts live in it, and what one token of one context costs."""

    contexts: tuple[int, ...]
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Limits:
    """What the scheduler may use."""

    rows: int
    """Most sequences at once."""
    prefill_chunk: int
    """Most prompt tokens per context and round."""
    memory: int
    """Bytes for all caches together."""
    caches: tuple[CacheSpec, ...]
    context_lengths: tuple[int | None, ...]
    """Per context, the longest sequence its model can hold."""
    positions: int | None = None
    """Most rows * width of one round: the logits of all of them are held at once."""
    kv_boundary: int | None = None
    """Key length at which a model's attention changes its bits; a round does not straddle it."""
    round_length: Callable[[int], int] = lambda length: -(-length // 64) * 64
    """Slot length that is allocated for a sequence of this many tokens."""
    pages: int | None = None
    """Pages that every cache has; None: rows live in slots of equal length."""
    page: int = 256
    """Tokens per page."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one slot's context to be cached: `ids` at positions `start`, `start + 1`, ..."""

    slot: int
    start: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class Round:
    """What the next round computes."""

    width: int
    """Tokens that every ready row decodes at most."""
    ready: tuple[bool, ...]
    """Per row: its whole text is cached, or will be by this round's chunks, so it decodes."""
    chunks: tuple[tuple[Chunk, ...], ...]
    """Per context."""
    moves: tuple[tuple[int, int], ...]
    """(from, to) rows to copy in every cache before anything else."""
    slots: int
    """Rows that every cache must have room for."""
    lengths: tuple[int, ...]
    """Per cache, the slot length that must be there."""


class Scheduler:
    """Keeps `running` (index = row) full of sequences within the limits; first come, first served."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.rejected: list[tuple[Sequence, str]] = []
        self.preemptions = 0
        self._admitted = 0
        self._holes: list[int] = []

    def next_round(self, source: Iterator[Sequence], width: int = 1) -> Round | None:
        """Plan a round of at most `width` tokens per row. None: nothing is running and nothing is waiting.

        Sequences that can never run are put on `rejected`, each with the reason.
        """
        self._preempt_until_it_fits()
        left = [self.limits.prefill_chunk] * len(self.limits.context_lengths)
        for sequence in sorted(self._live(), key=lambda s: s.order):
            self._take(sequence, left)
        self._admit(source, left)
        moves = self._close_holes()
        if not self.running:
            return None
        return self._plan(width, moves)

    def finish(self, rows: list[int]) -> None:
        """These rows are done; their slots are free for the next admissions."""
        self._holes.extend(rows)

    def _live(self) -> list[Sequence]:
        holes = set(self._holes)
        return [s for row, s in enumerate(self.running) if row not in holes]

    # memory

    def lengths(self, sequences: list[Sequence], width: int) -> tuple[int, ...]:
        """Slot length per cache that holds these sequences while they decode `width` more tokens."""
        return tuple(
            self.limits.round_length(
                max((s.known(c) for s in sequences for c in cache.contexts), default=0) + width
            )
            for cache in self.limits.caches
        )

    def slots(self, rows: int) -> int:
        """Slots allocated for this many rows: a power of two, so that a growing batch seldom moves its cache."""
        return min(self.limits.rows, 1 << (rows - 1).bit_length())

    def bytes_needed(self, sequences: list[Sequence], width: int) -> int:
        """Memory of all caches, were exactly these sequences running."""
        if self.limits.pages is not None:
            per_cache = [
                c.bytes_per_token * self.pages_needed(c, sequences, width)
                for c in self.limits.caches
            ]
            return self.limits.page * sum(per_cache)
        pairs = zip(self.limits.caches, self.lengths(sequences, width), strict=True)
        per_slot = sum(len(c.contexts) * length * c.bytes_per_token for c, length in pairs)
        return self.slots(len(sequences)) * per_slot

    def pages_needed(self, cache: CacheSpec, sequences: list[Sequence], width: int) -> int:
        """Pages of one cache for these sequences while they decode `width` more tokens."""
        return sum(
            -(-(s.known(c) + width) // self.limits.page) for s in sequences for c in cache.contexts
        )

    def _fits(self, sequences: list[Sequence], width: int) -> bool:
        if self.limits.pages is not None:
            return all(
                self.pages_needed(c, sequences, width) <= self.limits.pages
                for c in self.limits.caches
            )
        return self.bytes_needed(sequences, width) <= self.limits.memory

    def _preempt_until_it_fits(self) -> None:
        """The sequence admitted last gives way, keeps its output, and is first in line again.

        Plain decoding decides who fits, here and in `_admit`: drafts take what room is left (`_width`).
        """
        live = sorted(self._live(), key=lambda s: s.order)
        while len(live) > 1 and not self._fits(live, 1):
            self._drop(live[-1])
            self.waiting.appendleft(live.pop())
            self.preemptions += 1
        if live and not self._fits(live, 1):
            self._drop(live[0])
            self._reject(live[0])

    def _drop(self, sequence: Sequence) -> None:
        sequence.evict()
        self._holes.append(self.running.index(sequence))

    def _reject(self, sequence: Sequence) -> None:
        need, have = self.bytes_needed([sequence], 1) / 2**30, self.limits.memory / 2**30
        message = (
            f"a text of {max(map(sequence.known, range(len(sequence.prompts))))} tokens needs {need:.3g} GiB of KV "
            f"cache, and the budget is {have:.3g} GiB; raise kv_memory_gib"
        )
        self.rejected.append((sequence, message))

    # admission

    def _admit(self, source: Iterator[Sequence], left: list[int]) -> None:
        live = self._live()
        while len(live) < self.limits.rows and min(left) > 0:
            if not self.waiting:
                arrived = next(source, None)
                if arrived is None:
                    return
                self.waiting.append(arrived)
            sequence = self.waiting[0]
            if not self._fits([*live, sequence], 1):
                if live:
                    return
                self._reject(self.waiting.popleft())
                continue
            self.waiting.popleft()
            self._place(sequence)
            self._take(sequence, left)
            live.append(sequence)

    def _place(self, sequence: Sequence) -> None:
        if not sequence.order:
            self._admitted += 1
            sequence.order = self._admitted
        if self._holes:
            self.running[self._holes.pop()] = sequence
        else:
            self.running.append(sequence)

    def _take(self, sequence: Sequence, left: list[int]) -> None:
        for context in range(len(left)):
            left[context] -= min(left[context], sequence.pending(context))

    def _close_holes(self) -> list[tuple[int, int]]:
        """Fill the slots that no admission took from the end, so that the rows stay dense."""
        holes, moves = set(self._holes), []
        self._holes.clear()
        for hole in sorted(holes):
            while self.running and len(self.running) - 1 in holes:
                self.running.pop()
            if hole >= len(self.running):
                break
            moves.append((len(self.running) - 1, hole))
            self.running[hole] = self.running.pop()
            holes.remove(hole)
        return moves

    # the plan

    def _plan(self, width: int, moves: list[tuple[int, int]]) -> Round:
        contexts = range(len(self.limits.context_lengths))
        left = [self.limits.prefill_chunk] * len(contexts)
        chunks: list[list[Chunk]] = [[] for _ in contexts]
        ready = [True] * len(self.running)
        for row in sorted(range(len(self.running)), key=lambda r: self.running[r].order):
            sequence = self.running[row]
            for context in contexts:
                pending = sequence.pending(context)
                count = min(pending, left[context])
                left[context] -= count
                ready[row] &= count == pending
                if count:
                    start = sequence.cached[context]
                    chunks[context].append(
                        Chunk(row, start, sequence.tokens(context, start, count))
                    )
        width = self._width(width, ready)
        return Round(
            width=width,
            ready=tuple(ready),
            chunks=tuple(map(tuple, chunks)),
            moves=tuple(moves),
            slots=self.slots(len(self.running)),
            lengths=self.lengths(self.running, width),
        )

    def _width(self, width: int, ready: list[bool]) -> int:
        """No wider than what any row may still draw, than any context has room for, and than memory holds."""
        rows = [s for s, is_ready in zip(self.running, ready, strict=True) if is_ready]
        room = [
            self._room(s.known(context), limit) for s in rows for context, limit in self._limits(s)
        ]
        wanted = max((s.request.max_new_tokens - len(s.output) for s in rows), default=1)
        if self.limits.positions is not None:
            room.append(self.limits.positions // max(1, len(self.running)))
        width = max(1, min([width, wanted, *room]))
        while width > 1 and not self._fits(self.running, width):
            width //= 2
        return width

    def _limits(self, sequence: Sequence) -> list[tuple[int, int]]:
        """(context, key length) of the ends that this sequence's positions must not pass within one round."""
        contexts = [
            (c, limit) for c, limit in enumerate(self.limits.context_lengths) if limit is not None
        ]
        boundary = self.limits.kv_boundary
        if boundary is not None:
            contexts += [
                (c, boundary) for c in range(len(sequence.prompts)) if sequence.known(c) <= boundary
            ]
        return contexts

    @staticmethod
    def _room(known: int, limit: int) -> int:
        """Width of a round whose last position is the limit's last."""
        return limit - known + 1
