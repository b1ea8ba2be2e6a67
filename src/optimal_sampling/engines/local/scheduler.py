"""Which sequences run next: admission, preemption, prompt chunks, width of a round.

Plain Python, no tensors. A sequence has one *context* per model: its own prompt, then its output.
The running sequences are rows 0, 1, ... of every cache, without gaps.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from optimal_sampling.engines.local.memory import KVMemory
from optimal_sampling.types import Request

__all__ = ["Chunk", "Limits", "RoundPlan", "Scheduler", "Sequence"]


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
    granted: list[int] = field(default_factory=list)
    """Per context, the number of pending tokens to cache in the round being planned."""
    trace: list[Any] = field(default_factory=list)
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

    def __post_init__(self) -> None:
        """Nothing is drawn and nothing is cached."""
        if not self.outputs:
            shared: list[int] = []
            self.outputs = (shared,) * len(self.prompts)
        self.evict()

    @property
    def output(self) -> list[int]:
        """Ids of the completion, in the first context's vocabulary."""
        return self.outputs[0]

    @property
    def lengths(self) -> list[int]:
        """Per context, the number of tokens known so far: prompt and output."""
        pairs = zip(self.prompts, self.outputs, strict=True)
        return [len(prompt) + len(output) for prompt, output in pairs]

    def known(self, context: int) -> int:
        """Number of tokens known so far: prompt and output."""
        return len(self.prompts[context]) + len(self.outputs[context])

    def pending(self, context: int) -> int:
        """Known tokens that must be cached before decoding, which itself feeds the last one."""
        return self.known(context) - 1 - self.cached[context]

    def last(self, context: int) -> int:
        """The last known token, which is fed to decode the next one."""
        output = self.outputs[context]
        return output[-1] if output else self.prompts[context][-1]

    def tokens(self, context: int, start: int, count: int) -> list[int]:
        """`count` known token ids from position `start`."""
        prompt, output = self.prompts[context], self.outputs[context]
        first, end = start - len(prompt), start + count - len(prompt)
        return [*prompt[start : start + count], *output[max(0, first) : max(0, end)]]

    def evict(self) -> None:
        """Forget what the caches hold. The output stays, and is recomputed like a prompt."""
        self.cached = [0] * len(self.prompts)
        self.long = [False] * len(self.prompts)


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
    lengths: list[list[int]]
    """Per row and context, the tokens known before the round; caches need `width` more."""


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
        self._holes: list[int] = []

    def next_round(self, source: Iterator[Sequence], width: int = 1) -> RoundPlan | None:
        """Plan a round of at most `width` tokens per row. None: nothing runs and nothing waits.

        Sequences that can never run are put on `rejected`, each with the reason; `source` may put
        some there too.
        """
        live = self._preempt_until_it_fits()
        left = [self.limits.prefill_chunk] * len(self.limits.context_lengths)
        for sequence in live:
            self._grant(sequence, left)
        self._admit(source, live, left)
        moves = self._close_holes()
        return self._plan(width, moves) if self.running else None

    def finish(self, rows: list[int]) -> None:
        """These rows have ended; the next admissions take their place."""
        self._holes.extend(rows)

    # memory

    def _preempt_until_it_fits(self) -> list[Sequence]:
        """The sequences that go on, by admission.

        The one admitted last gives way, keeps its output, and is the first to wait.
        """
        holes = set(self._holes)
        live = [s for row, s in enumerate(self.running) if row not in holes]
        live.sort(key=lambda s: s.order)
        lengths = [s.lengths for s in live]
        while live and not self.memory.fits(lengths, 1):
            sequence = live.pop()
            lengths.pop()
            sequence.evict()
            self._holes.append(self.running.index(sequence))
            if live:
                self.waiting.appendleft(sequence)
                self.preemptions += 1
            else:
                self._reject(sequence)
        return live

    def _reject(self, sequence: Sequence) -> None:
        lengths = sequence.lengths
        need, have = self.memory.bytes_needed([lengths], 1) / 2**30, self.memory.budget / 2**30
        message = (
            f"a text of {max(lengths)} tokens needs {need:.3g} GiB of KV cache, "
            f"and the budget is {have:.3g} GiB; raise kv_memory_gib"
        )
        self.rejected.append((sequence, message))

    # admission

    def _admit(self, source: Iterator[Sequence], live: list[Sequence], left: list[int]) -> None:
        lengths = [s.lengths for s in live]
        while len(lengths) < self.limits.rows and min(left) > 0:
            if not self.waiting:
                arrived = next(source, None)
                if arrived is None:
                    return
                self.waiting.append(arrived)
            sequence = self.waiting[0]
            lengths.append(sequence.lengths)
            if self.memory.fits(lengths, 1):
                self.waiting.popleft()
                self._place(sequence)
                self._grant(sequence, left)
            elif len(lengths) > 1:
                return
            else:
                lengths.pop()
                self._reject(self.waiting.popleft())

    def _place(self, sequence: Sequence) -> None:
        if not sequence.order:
            self._admitted += 1
            sequence.order = self._admitted
        if self._holes:
            self.running[self._holes.pop()] = sequence
        else:
            self.running.append(sequence)

    def _grant(self, sequence: Sequence, left: list[int]) -> None:
        """Its share of the round's prompt tokens, out of what is left per context."""
        for context, switch in enumerate(self.limits.rope_switches):
            long = switch is not None and sequence.known(context) > switch
            if long and not sequence.long[context]:
                sequence.cached[context] = 0
                sequence.long[context] = True
        sequence.granted = [min(n, sequence.pending(c)) for c, n in enumerate(left)]
        for context, count in enumerate(sequence.granted):
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
        for row in sorted(range(len(self.running)), key=lambda r: self.running[r].order):
            sequence = self.running[row]
            for context, count in enumerate(sequence.granted):
                ready[row] &= count == sequence.pending(context)
                if count:
                    start = sequence.cached[context]
                    ids = sequence.tokens(context, start, count)
                    chunks[context].append(Chunk(row, start, ids, sequence.long[context]))
        lengths = [s.lengths for s in self.running]
        return RoundPlan(self._width(width, ready, lengths), ready, chunks, moves, lengths)

    def _width(self, width: int, ready: list[bool], lengths: list[list[int]]) -> int:
        """No more than a ready row may draw, than contexts have room for, and than memory holds."""
        if width == 1:
            return 1
        rows = [row for row, is_ready in enumerate(ready) if is_ready]
        sequences = [self.running[row] for row in rows]
        bounds = [width, *(room for row in rows for room in self._room(lengths[row]))]
        left = [s.request.max_new_tokens - len(s.output) for s in sequences]
        bounds.append(max(left, default=1))
        bounds.append(self.limits.positions // len(self.running))
        if any(s.lockstep for s in sequences):
            bounds.append(1)
        width = max(1, min(bounds))
        while width > 1 and not self.memory.fits(lengths, width):
            width //= 2
        return width

    def _room(self, lengths: list[int]) -> list[int]:
        """Widths that end at a context's last position, or at the last key before the boundary."""
        pairs = zip(lengths, self.limits.context_lengths, strict=True)
        room = [limit - known + 1 for known, limit in pairs if limit is not None]
        pairs = zip(lengths, self.limits.rope_switches, strict=False)
        room += [s - known + 1 for known, s in pairs if s is not None and known <= s]
        boundary = self.limits.kv_boundary
        return room + [boundary - known + 1 for known in lengths if known <= boundary]
