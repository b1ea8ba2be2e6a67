"""One `generate` call at the level of bytes.

Rows draw symbol by symbol, all that can in one step, until a token has ended whose law they lack.
When every row waits for a model, each model runs once for all rows that wait for it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from optimal_sampling.engines.base import bad_logits_message
from optimal_sampling.engines.bytes.contexts import ByteModel
from optimal_sampling.engines.bytes.drafting import ByteDrafter, DraftChoice
from optimal_sampling.engines.bytes.mixing import SymbolMixer
from optimal_sampling.engines.bytes.row import RowSettings, TextRow
from optimal_sampling.engines.local.memory import KVMemory, Lengths
from optimal_sampling.engines.local.round import RunSettings
from optimal_sampling.types import Completion, Request

__all__ = ["ByteLoop"]

_FEW = 0.1  # of rows, whose prompts change little in the cost of a round


class ByteLoop:
    """State of one `generate` call."""

    def __init__(
        self,
        models: dict[str, ByteModel],
        settings: RowSettings,
        mixer: SymbolMixer,
        run: RunSettings,
    ) -> None:
        self.models = models
        self.settings = settings
        self.mixer = mixer
        self.drafter: ByteDrafter | None = None
        self.choice = DraftChoice()
        self.run = run
        caches = [model.contexts.cache for model in models.values()]
        self._caches = caches
        self.memory = KVMemory([cache.manager for cache in caches], run.memory)
        self.rows: list[TextRow] = []
        self.waiting: deque[TextRow] = deque()
        self.rounds = 0
        self.symbols = 0
        """Drawn so far."""
        self.accepted = 0
        """Of the symbols of drafts, those that were drawn, of texts that have ended."""

    def completions(self, requests: Iterable[Request | None]) -> Iterator[Completion]:
        """Serve the requests."""
        source = iter(requests)
        while True:
            yield from self._admit(source)
            if not self.rows:
                return
            self._run_round()
            for index in reversed(range(len(self.rows))):
                if self.rows[index].finished:
                    row = self._remove(index)
                    self.accepted += row.accepted
                    yield row.completion()

    def close(self) -> None:
        """Free the caches."""
        for cache in self._caches:
            cache.release()

    # which rows run

    def _admit(self, source: Iterator[Request | None]) -> Iterator[Completion]:
        """Place rows while there is memory; yields the requests that cannot be served.

        The source gives None where no request is waiting now.
        """
        while len(self.rows) < self.run.limits.rows:
            if not self.waiting:
                request = next(source, None)
                if request is None:
                    return
                problem = self.run.problem(request)
                if problem:
                    yield Completion.failed(request, problem)
                    continue
                self.waiting.append(TextRow(request, self.settings))
            row = self.waiting[0]
            if self._fits([*self.rows, row]):
                self._place(self.waiting.popleft())
            elif self.rows:
                return
            else:
                self.waiting.popleft().fail(self._memory_message(row))
                yield row.completion()

    def _place(self, row: TextRow) -> None:
        for role, model in self.models.items():
            model.contexts.place(len(self.rows), row.request.prompt_ids(role))
        self.rows.append(row)

    def _remove(self, index: int) -> TextRow:
        """Take a row out; the last one takes its place."""
        row, last = self.rows[index], self.rows.pop()
        if row is not last:
            self.rows[index] = last
        for model in self.models.values():
            model.contexts.move(len(self.rows), index)
        return row

    def _yield_memory(self) -> None:
        """Give every row memory; the latest rows wait where there is not enough."""
        while len(self.rows) > 1 and not self._fits(self.rows):
            self.waiting.appendleft(self._remove(len(self.rows) - 1))
        if not self._has_room(1):
            self.rows[0].fail(self._memory_message(self.rows[0]))

    def _has_room(self, width: int) -> bool:
        """Make room for so many more tokens of every row, if the memory holds them."""
        return self.make_room(self._lengths(self.rows), width)

    @torch.inference_mode()
    def make_room(self, lengths: Lengths, width: int) -> bool:
        """Room for rows of these lengths and `width` more tokens each, if the memory holds them."""
        if not self.memory.fits(lengths, width):
            return False
        for index in self.memory.reservations(lengths, width):
            self._caches[index].make_room(lengths, width)
        return True

    def _fits(self, rows: list[TextRow]) -> bool:
        return self.memory.fits(self._lengths(rows), 1)

    def _lengths(self, rows: list[TextRow]) -> Lengths:
        return np.array([[row.length(role) for role in self.models] for row in rows])

    def _memory_message(self, row: TextRow) -> str:
        need = self.memory.bytes_needed(self._lengths([row]), 1) / 2**30
        return (
            f"this text needs {need:.3g} GiB of KV cache, and the budget is "
            f"{self.memory.budget / 2**30:.3g} GiB; raise kv_memory_gib"
        )

    # what they do

    def _run_round(self) -> None:
        """Every model runs at most once, or as often as drafts need it; rows draw what they can."""
        started, symbols = time.perf_counter(), self.symbols
        self.rounds += 1
        self._yield_memory()
        prompts = sum(not row.prompts_are_read for row in self.rows)
        measured = prompts <= _FEW * len(self.rows)
        if self.drafter is not None and self.choice.drafts(measured):
            self.drafter.run(self.rows, self._has_room)
        self._run_models()
        self.draw()
        if measured:
            self.choice.observe(self.symbols - symbols, time.perf_counter() - started)

    def _run_models(self) -> None:
        """One forward pass of each model that a row waits for."""
        for role, model in self.models.items():
            wanted = {
                index: context
                for index, row in enumerate(self.rows)
                if not row.finished and (context := row.wanted(role)) is not None
            }
            if not wanted:
                continue
            logits = model.contexts.evaluate(wanted)
            if not logits:
                continue
            rows = torch.stack(list(logits.values()))
            laws = model.laws.read(rows, [wanted[index] for index in logits])
            for index, law in zip(logits, laws, strict=True):
                if law is None:
                    self._fail(index, role)
                else:
                    self.rows[index].receive(role, law)

    def _fail(self, index: int, role: str) -> None:
        """A model's logits are bad."""
        row = self.rows[index]
        position = len(row.wanted(role) or ())
        row.fail(bad_logits_message(position, role == "student", role == "teacher"))
        for model in self.models.values():
            model.contexts.clear(index)

    def draw(self) -> None:
        """Symbols of all rows, until each has ended or waits for a model."""
        while self.draw_symbols():
            pass

    def draw_symbols(self) -> int:
        """One symbol of every row that waits for no model; how many these are."""
        free = [row for row in self.rows if not row.finished and not row.blocked]
        for row in free:
            row.check()
        ready = [row for row in free if not row.finished]
        if ready:
            roles = self.settings.roles
            laws = [np.stack([row.views[role].law() for row in ready]) for role in roles]
            symbols, traces = self.mixer.draw(laws, [row.place() for row in ready])
            for row, symbol, trace in zip(ready, symbols, traces, strict=True):
                row.append(symbol, trace)
        self.symbols += len(ready)
        return len(ready)
