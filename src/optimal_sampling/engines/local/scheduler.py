"""Which sequences run next: admission, preemption, prompt chunks, width of a round.

No tensors. A sequence has one *context* per model: its own prompt, then its output.
The running sequences are rows 0, 1, ... of every cache, without gaps.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
from jaxtyping import Int

from optimal_sampling.engines.local.memory import KVMemory, Lengths
from optimal_sampling.types import Request

__all__ = ["Chunk", "Limits", "RoundPlan", "Scheduler", "Sequence", "lengths_of"]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in progress: what has been drawn, and how much of it each cache holds."""

    request: Request
    prompts: tuple[tuple[int, ...], ...]
    """Prompt ids, one tuple per context."""
    outputs: tuple[list[int], ...] = ()
    """Ids drawn so far, one list per context; the same list while the models share their ids."""
    cached: list[int] = field(default_factory=list)
    """Per context, the number of leading tokens whose keys and values are in the cache."""
    trace: bytearray = field(default_factory=bytearray)
    """The diagnostics of each token drawn so far, float32 in the order of TRACE_FIELDS."""
    captured: list[Any] = field(default_factory=list)
    lookup: Any = None
    """Index for drafts from this text, where the run drafts so."""
    long: list[bool] = field(default_factory=list)
    """Per context: the cached keys have the long rotary factors."""
    lockstep: bool = False
    """Draw one token per round: a draft may have put NaN into this sequence's caches."""
    order: int = 0
    """Number of its first admission, from 1; the latest is preempted first."""
    started: float = field(default_factory=time.perf_counter)
    noise_key: int = field(init=False)
    """That of the request, hashed once."""

    def __post_init__(self) -> None:
        """Nothing is drawn and nothing is cached."""
        if not self.outputs:
            shared: list[int] = []
            self.outputs = (shared,) * len(self.prompts)
        self.noise_key = self.request.noise_key
        self.evict()

    @property
    def output(self) -> list[int]:
        """Ids of the completion, in the first context's vocabulary."""
        return self.outputs[0]

    def known(self, context: int) -> int:
        """Number of tokens known so far: prompt and output."""
        return len(self.prompts[context]) + len(self.outputs[context])

    def pending(self, context: int) -> int:
        """Known tokens that must be cached before decoding, which itself feeds the last one."""
        return self.known(context) - 1 - self.cached[context]

    def tokens(self, context: int, start: int, count: int) -> list[int]:
        """`count` known token ids from position `start`."""
        prompt, output = self.prompts[context], self.outputs[context]
        first, end = start - len(prompt), start + count - len(prompt)
        return [*prompt[start : start + count], *output[max(0, first) : max(0, end)]]

    def evict(self) -> None:
        """Forget what the caches hold. The output stays, and is recomputed like a prompt."""
        self.cached = [0] * len(self.prompts)
        self.long = [False] * len(self.prompts)


def lengths_of(sequences: list[Sequence], contexts: int) -> Lengths:
    """Tokens known so far of each sequence and context: prompt and output."""
    columns = [
        [len(s.prompts[context]) + len(s.outputs[context]) for s in sequences]
        for context in range(contexts)
    ]
    return np.array(columns, dtype=np.int64).T


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a round beside memory."""

    rows: int
    """Most sequences at once."""
    prefill_chunk: int
    """Most prompt tokens per context and round."""
    context_lengths: tuple[int | None, ...]
    """Per context, the longest sequence that its model can hold."""
    positions: int = sys.maxsize
    """Most rows * width of one round: the logits of all of them are held at once."""
    kv_boundary: int = sys.maxsize
    """Key length at which a model's attention changes its bits; a round does not straddle it."""
    gather: float = 0.0
    """Share of the rows that have to end before others are admitted; 0: one row is enough.

    For models whose rounds with prompt tokens take many times as long as others.
    """
    rope_switches: tuple[int | None, ...] = ()
    """Per context, the longest text with the short rotary factors. Past it all is recomputed.

    Empty where no model has a switch.
    """


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one row to be cached: `ids` at positions `start`, `start + 1`, ..."""

    row: int
    start: int
    ids: list[int]
    long: bool = False
    """The row's text is longer than its context's `rope_switches`."""


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """What the next round computes."""

    width: int
    """Most tokens that a ready row decodes."""
    ready: list[bool]
    """Per row: all of its text is cached once this round's chunks are, so it decodes."""
    chunks: list[list[Chunk]]
    """Per context."""
    moves: list[tuple[int, int]]
    """(from, to) rows to copy in every cache before anything else."""
    lengths: Lengths
    """The tokens known before the round; caches need `width` more."""
    left: Int[np.ndarray, " rows"]
    """Tokens that each text may still have, by its request and by the contexts."""

    def begun(self, behind: Int[np.ndarray, " rows"], ended: Collection[int]) -> RoundPlan:
        """This plan, made by `Scheduler.following`, once the round before it is finished.

        `behind`: tokens that each row has fewer than `lengths`. `ended`: rows that are of no use.
        """
        ready = [row not in ended for row in range(len(self.ready))]
        lengths = self.lengths - behind[:, None]
        return replace(self, ready=ready, lengths=lengths, left=self.left + behind)


class Scheduler:
    """Keeps `running` (index = row) full of sequences within the limits; first come, first served.

    Plain decoding decides who fits into memory; drafts take what room is left.
    """

    def __init__(self, limits: Limits, memory: KVMemory) -> None:
        self.limits = limits
        self.memory = memory
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.rejected: list[tuple[Sequence, str]] = []
        self.preemptions = 0
        self._admitted = 0
        self._most_live = sys.maxsize
        """Rows with which the latest admission filled rows or memory; else a number never reached.
        """
        self._lacking = False
        """The latest admission ended because nothing was waiting, in the source either."""
        self._holes: list[int] = []
        self._granted: dict[Sequence, list[int]] = {}
        """Per context, the number of pending tokens to cache in the round being planned.

        Of sequences that have any pending.
        """

    def next_round(self, source: Iterator[Sequence | None], width: int = 1) -> RoundPlan | None:
        """Plan a round of at most `width` tokens per row. None: nothing runs and nothing waits.

        Sequences that can never run are put on `rejected`, each with the reason; `source` may put
        some there too, and gives None where none is waiting now.
        """
        self._granted.clear()
        live, lengths = self._preempt_until_it_fits()
        left = [self.limits.prefill_chunk] * len(self.limits.context_lengths)
        for sequence in self._reading(live, lengths):
            self._grant(sequence, left)
        self._admit(source, lengths, left)
        moves = self._close_holes()
        return self._plan(width, moves) if self.running else None

    def following(self, plan: RoundPlan, drawn: int = 1, width: int = 1) -> RoundPlan | None:
        """The round after `plan`, should no text end in it; before its tokens are known.

        At most `width` tokens per row, after `drawn` at most of every row in this round. Lengths
        are those of the longest texts, and `left` is the least: `RoundPlan.begun` corrects them.

        None where that round has other rows or reads prompt tokens, moves memory, or may not be.
        Admission need not be tried again: what stopped it, for a plan without chunks, holds until
        a text ends.
        """
        if any(plan.chunks) or not all(plan.ready) or plan.left.min() < 2:
            return None
        lengths = plan.lengths + drawn
        bounds = [width, *self._rooms(lengths, plan.lengths), int(plan.left.max()) - 1]
        bounds += self._bounds(self.running)
        width = min(bounds)
        if width < 1 or self.memory.reservations(lengths, width):
            return None
        return replace(plan, width=width, moves=[], lengths=lengths, left=plan.left - drawn)

    def has_arrived(self, source: Iterator[Sequence | None]) -> bool:
        """Whether there is something to admit, where the latest admission ended for lack of it."""
        if self._lacking and not self.waiting:
            arrived = next(source, None)
            if arrived is not None:
                self.waiting.append(arrived)
        return self._lacking and bool(self.waiting or self.rejected)

    def finish(self, rows: list[int]) -> None:
        """These rows have ended; the next admissions take their place."""
        self._holes.extend(rows)

    # memory

    def _preempt_until_it_fits(self) -> tuple[list[Sequence], Lengths]:
        """The sequences that go on, and their lengths.

        The one admitted last gives way, keeps its output, and is the first to wait.
        """
        holes = set(self._holes)
        live = [s for row, s in enumerate(self.running) if row not in holes]
        lengths = self._lengths(live)
        if live and self.memory.fits(lengths, 1):
            return live, lengths
        live.sort(key=attrgetter("order"))
        while live and not self.memory.fits(self._lengths(live), 1):
            sequence = live.pop()
            sequence.evict()
            self._holes.append(self.running.index(sequence))
            if live:
                self.waiting.appendleft(sequence)
                self.preemptions += 1
            else:
                self._reject(sequence)
        return live, self._lengths(live)

    def _reject(self, sequence: Sequence) -> None:
        lengths = self._lengths([sequence])
        need, have = self.memory.bytes_needed(lengths, 1) / 2**30, self.memory.budget / 2**30
        message = (
            f"a text of {lengths.max()} tokens needs {need:.3g} GiB of KV cache, "
            f"and the budget is {have:.3g} GiB; raise kv_memory_gib"
        )
        self.rejected.append((sequence, message))

    def _lengths(self, sequences: list[Sequence]) -> Lengths:
        return lengths_of(sequences, len(self.limits.context_lengths))

    # admission

    def _admit(self, source: Iterator[Sequence | None], lengths: Lengths, left: list[int]) -> None:
        """Place sequences beside those of these `lengths` while rows, memory and `left` allow."""
        if self._gathers(len(lengths)):
            return
        self._most_live = sys.maxsize
        self._lacking = False
        while len(lengths) < self.limits.rows and min(left) > 0:
            if not self.waiting:
                arrived = next(source, None)
                if arrived is None:
                    self._lacking = True
                    return
                self.waiting.append(arrived)
            sequence = self.waiting[0]
            with_it = np.concatenate([lengths, self._lengths([sequence])])
            if self.memory.fits(with_it, 1):
                lengths = with_it
                self.waiting.popleft()
                self._place(sequence)
                self._grant(sequence, left)
            elif len(lengths):
                self._most_live = len(lengths)
                return
            else:
                self._reject(self.waiting.popleft())
        if len(lengths) == self.limits.rows:
            self._most_live = len(lengths)

    def _gathers(self, live: int) -> bool:
        """Whether more rows have to end before an admission is worth its slow round.

        A round that reads prompt tokens in any case admits whatever fits.
        """
        if not live or self._granted:
            return False
        return self._most_live - live < self.limits.gather * self._most_live

    def _place(self, sequence: Sequence) -> None:
        if not sequence.order:
            self._admitted += 1
            sequence.order = self._admitted
        if self._holes:
            self.running[self._holes.pop()] = sequence
        else:
            self.running.append(sequence)

    def _reading(self, live: list[Sequence], lengths: Lengths) -> list[Sequence]:
        """The sequences whose caches lack tokens, by admission."""
        if self.limits.rope_switches:
            for sequence in live:
                self._switch_rope(sequence)
        cached = np.array([s.cached for s in live], dtype=np.int64).reshape(lengths.shape)
        lacking = cached < lengths - 1
        reading = [live[i] for i in np.flatnonzero(lacking.any(1))]
        return sorted(reading, key=attrgetter("order"))

    def _switch_rope(self, sequence: Sequence) -> None:
        """Past a context's switch, all of it has to be cached anew."""
        for context, switch in enumerate(self.limits.rope_switches):
            long = switch is not None and sequence.known(context) > switch
            if long and not sequence.long[context]:
                sequence.cached[context] = 0
                sequence.long[context] = True

    def _grant(self, sequence: Sequence, left: list[int]) -> None:
        """Its share of the round's prompt tokens, out of what is left per context."""
        if self.limits.rope_switches:
            self._switch_rope(sequence)
        pending = [sequence.pending(context) for context in range(len(left))]
        if any(pending):
            granted = [min(pair) for pair in zip(left, pending, strict=True)]
            self._granted[sequence] = granted
            for context, count in enumerate(granted):
                left[context] -= count

    def _close_holes(self) -> list[tuple[int, int]]:
        """Move rows from the end to where a row ended and no admission took its place."""
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

    def _plan(self, width: int, moves: list[tuple[int, int]]) -> RoundPlan:
        chunks: list[list[Chunk]] = [[] for _ in self.limits.context_lengths]
        ready = [True] * len(self.running)
        for row in self._granted_rows():
            sequence = self.running[row]
            for context, count in enumerate(self._granted[sequence]):
                ready[row] &= count == sequence.pending(context)
                if count:
                    start = sequence.cached[context]
                    ids = sequence.tokens(context, start, count)
                    chunks[context].append(Chunk(row, start, ids, sequence.long[context]))
        lengths = self._lengths(self.running)
        width = self._width(width, ready, lengths)
        return RoundPlan(width, ready, chunks, moves, lengths, self._left(lengths))

    def _left(self, lengths: Lengths) -> Int[np.ndarray, " rows"]:
        """Tokens that each running text may still have."""
        left = np.array([s.request.max_new_tokens - len(s.outputs[0]) for s in self.running])
        for known, limit in zip(lengths.T, self.limits.context_lengths, strict=True):
            if limit is not None:
                left = np.minimum(left, limit - known)
        return left

    def _granted_rows(self) -> list[int]:
        """The rows that have tokens to cache, by admission."""
        if not self._granted:
            return []
        rows = [row for row, sequence in enumerate(self.running) if sequence in self._granted]
        return sorted(rows, key=lambda row: self.running[row].order)

    def _width(self, width: int, ready: list[bool], lengths: Lengths) -> int:
        """No more than a ready row may draw, than contexts have room for, and than memory holds."""
        if width == 1:
            return 1
        sequences = [s for s, is_ready in zip(self.running, ready, strict=True) if is_ready]
        left = [s.request.max_new_tokens - len(s.outputs[0]) for s in sequences]
        bounds = [width, *self._rooms(lengths[ready], lengths[ready])]
        bounds.append(max(left, default=1))
        width = max(1, min(bounds + self._bounds(sequences)))
        while width > 1 and not self.memory.fits(lengths, width):
            width //= 2
        return width

    def _bounds(self, sequences: list[Sequence]) -> list[int]:
        """Widths that the memory for logits allows, and rows that must not draft."""
        lockstep = [1] if any(s.lockstep for s in sequences) else []
        return [max(1, self.limits.positions // len(self.running)), *lockstep]

    def _rooms(self, longest: Lengths, least: Lengths) -> list[int]:
        """Widths that end at a context's last position, or at the last key before a boundary.

        Of texts whose lengths are somewhere from `least` to `longest`.
        """
        limits, boundary = self.limits, self.limits.kv_boundary
        switches = limits.rope_switches or (None,) * len(limits.context_lengths)
        columns = zip(longest.T, least.T, limits.context_lengths, switches, strict=True)
        rooms = []
        for most, known, limit, switch in columns:
            if limit is not None:
                rooms.append(limit - int(most.max(initial=0)) + 1)
            before = [end for end in (switch, boundary) if end is not None]
            rooms += [end - int(most[known <= end].max(initial=0)) + 1 for end in before]
        return rooms
