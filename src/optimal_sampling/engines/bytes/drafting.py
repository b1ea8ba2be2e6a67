"""Drafts of bytes: laws that a text will probably need, made ahead in few forward passes.

The student draws on alone, with the noise of the text. The teacher reads the tokens that its
tokenizer makes of this draft in one pass. The views then find the laws of their contexts known, and
the text is drawn as it is without drafts; where it goes another way, what was made ahead is thrown
away. So a draft changes no symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from optimal_sampling.engines.bytes.byte_view import END, Birth, ByteView, Hypothesis
from optimal_sampling.engines.bytes.contexts import ByteModel
from optimal_sampling.engines.bytes.mixing import Place, SymbolMixer
from optimal_sampling.engines.bytes.row import TextRow
from optimal_sampling.engines.bytes.text import TokenizedText

__all__ = ["ByteDrafter", "DraftChoice", "MeasuredChoice"]

End = tuple[tuple[int, ...], int]
"""A context, and of how many of its last tokens laws are needed."""


@dataclass(slots=True, eq=False)
class _Draft:
    """The student's text beyond that of a row, until it has `tokens` tokens."""

    row: TextRow
    view: ByteView
    tokens: int
    symbols: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def ended(self) -> bool:
        """Nothing more is to be drafted."""
        ended = self.failed or self.symbols[-1:] == [END]
        return ended or _longest(self.view) >= self.tokens

    def place(self) -> Place:
        """Where the next symbol stands."""
        return Place(self.row.key, len(self.view.text), 0)

    def append(self, symbol: int) -> None:
        """The draft goes on."""
        self.symbols.append(symbol)
        if symbol != END:
            self.view.push(symbol)


def _longest(view: ByteView) -> int:
    """Tokens of the longest context that a view follows."""
    followed = [h.context for h in view.live] + [b.context for b in view.wanted]
    return max(map(len, followed), default=0)


class ByteDrafter:
    """Drafts of `count` tokens of the student's. `limits`: by role, the longest text."""

    def __init__(
        self,
        models: Mapping[str, ByteModel],
        mixer: SymbolMixer,
        teacher_text: TokenizedText,
        limits: Mapping[str, int | None],
        count: int,
    ) -> None:
        self.models = models
        self.mixer = mixer
        self.teacher_text = teacher_text
        self.limits = limits
        self.count = count
        self.drafted = 0
        """Symbols."""

    def run(self, rows: list[TextRow], make_room: Callable[[int], bool]) -> None:
        """Draft for the rows that have used up theirs. `make_room`: for so many more tokens."""
        drafts = {index: self._start(row) for index, row in enumerate(rows) if self._wants(row)}
        if not drafts or not make_room(self.count + 1):
            return
        self._draw(drafts)
        ends = {index: self._end(draft) for index, draft in drafts.items() if draft.symbols}
        wanted = self._readable(rows, {i: end for i, end in ends.items() if end is not None})
        if wanted and make_room(2 * max(count for _, count in wanted.values())):
            self._read(rows, wanted)
        for draft in drafts.values():
            draft.row.draft = draft.symbols
            self.drafted += len(draft.symbols)
            draft.row.settle()

    def _wants(self, row: TextRow) -> bool:
        """The prompts are read, nothing is left of a draft, and the student has room for one."""
        limit = self.limits["student"]
        has_room = limit is None or row.length("student") + self.count < limit
        return bool(row.prompts_are_read and has_room and not row.draft and not row.finished)

    def _start(self, row: TextRow) -> _Draft:
        view = row.views["student"].copy()
        return _Draft(row, view, _longest(view) + self.count)

    # the student

    def _draw(self, drafts: Mapping[int, _Draft]) -> None:
        """Symbols of all drafts; the student runs for all that wait for it in one pass."""
        while going := {index: draft for index, draft in drafts.items() if not draft.ended}:
            waiting = {i: d.view.wanted[-1].context for i, d in going.items() if d.view.wanted}
            if waiting:
                self._evaluate(drafts, waiting)
            ready = [draft for draft in going.values() if not draft.view.wanted]
            ready = [draft for draft in ready if not draft.ended]
            if ready:
                laws = np.stack([draft.view.law() for draft in ready])
                symbols = self.mixer.draft(laws, [draft.place() for draft in ready])
                for draft, symbol in zip(ready, symbols, strict=True):
                    draft.append(symbol)

    def _evaluate(
        self, drafts: Mapping[int, _Draft], wanted: Mapping[int, tuple[int, ...]]
    ) -> None:
        """Give the student's views laws, which the rows then know too."""
        model = self.models["student"]
        found = model.contexts.evaluate(wanted)
        if not found:
            return
        contexts = [wanted[index] for index in found]
        laws = model.laws.read(torch.stack(list(found.values())), contexts)
        for index, law in zip(found, laws, strict=True):
            draft = drafts[index]
            if law is None:
                draft.failed = True
            else:
                draft.row.known["student"][wanted[index]] = law
                draft.view.receive(law)

    # the teacher

    def _end(self, draft: _Draft) -> End | None:
        """The teacher's context after the draft, from the hypothesis with most mass."""
        view = draft.row.views["teacher"]
        base: Birth | Hypothesis = view.wanted[0] if view.wanted else view.leading
        symbols = bytes(symbol for symbol in draft.symbols if symbol != END)
        ids = self.teacher_text.of_characters(bytes(view.text[base.start :]) + symbols)
        if not ids:
            return None
        return (*base.context, *ids), len(ids) + bool(view.wanted)

    def _readable(self, rows: list[TextRow], ends: Mapping[int, End]) -> dict[int, End]:
        """Those that have the same laws in one pass as token by token."""
        width = max((count for _, count in ends.values()), default=0)
        limit = self.limits["teacher"]
        found = {}
        for index, (context, count) in ends.items():
            length = len(rows[index].request.teacher_prompt_ids) + len(context) + width
            fits = limit is None or length <= limit
            if fits and self.models["teacher"].contexts.takes_ends(index, context, width):
                found[index] = (context, count)
        return found

    def _read(self, rows: list[TextRow], wanted: Mapping[int, End]) -> None:
        """Laws after the last tokens of every context."""
        model = self.models["teacher"]
        for index, logits in model.contexts.evaluate_ends(wanted).items():
            context, count = wanted[index]
            ends = range(len(context) - count + 1, len(context) + 1)
            contexts = [context[:end] for end in ends]
            for each, law in zip(contexts, model.laws.read(logits, contexts), strict=True):
                if law is not None:
                    rows[index].known["teacher"][each] = law


class DraftChoice:
    """Drafts in every round."""

    def drafts(self, measured: bool) -> bool:
        """Whether the next round drafts. `measured`: it reads few prompts, `observe` follows."""
        return True

    def observe(self, symbols: int, seconds: float) -> None:
        """A measured round has drawn so many symbols in so many seconds."""


class MeasuredChoice(DraftChoice):
    """`auto`: rounds without drafts, rounds with them, then many of the kind that costs less.

    Over and over, as texts and numbers of rows change.
    """

    TRIED = 8
    """Measured rounds of each kind. The first two are not counted: laws that were made ahead, and
    memory that is used for the first time."""
    KEPT = 300
    """Measured rounds of the kind that costs less."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._rounds = 0
        self._symbols = {False: 0, True: 0}
        self._seconds = {False: 0.0, True: 0.0}

    def drafts(self, measured: bool) -> bool:
        """As in `DraftChoice`."""
        if self._rounds < 2 * self.TRIED:
            return measured and self._rounds >= self.TRIED
        return self._cost(True) < self._cost(False)

    def _cost(self, drafts: bool) -> float:
        """Seconds per symbol."""
        return self._seconds[drafts] / max(1, self._symbols[drafts])

    def observe(self, symbols: int, seconds: float) -> None:
        """As in `DraftChoice`."""
        if self._rounds < 2 * self.TRIED and self._rounds % self.TRIED >= 2:
            drafted = self._rounds >= self.TRIED
            self._symbols[drafted] += symbols
            self._seconds[drafted] += seconds
        self._rounds += 1
        if self._rounds == 2 * self.TRIED + self.KEPT:
            self._start()
