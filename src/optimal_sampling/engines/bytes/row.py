"""`TextRow`: one request in progress at the level of bytes, from its views to its completion."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from optimal_sampling.distribution import gumbel, keys_tensor
from optimal_sampling.engines.bytes.byte_view import END, ByteView, TokenLaw
from optimal_sampling.engines.bytes.mixing import Place, TraceRow
from optimal_sampling.engines.bytes.text import TokenizedText, token_trace
from optimal_sampling.engines.bytes.trie import ByteTrie
from optimal_sampling.engines.bytes.utf8 import whole_characters
from optimal_sampling.types import ByteLevel, Completion, FinishReason, Request, TokenTrace

__all__ = ["RowSettings", "TextRow"]

_BYTES_BETWEEN_COUNTS = 16  # where only the tokenizer can count the student's tokens


@dataclass(frozen=True, slots=True, eq=False)
class RowSettings:
    """What all rows of a run have in common."""

    roles: tuple[str, ...]
    tries: dict[str, ByteTrie]
    contexts: dict[str, int | None]
    """By role, the longest text of its model."""
    texts: dict[str, TokenizedText]
    """Of student and teacher, whichever take part."""
    end_id: int
    """The student's id after a text, where the student has no view that says which."""
    tolerance: float
    force_first_token: bool


class TextRow:
    """A text, the views of it, and what was drawn so far."""

    def __init__(self, request: Request, settings: RowSettings) -> None:
        self.request = request
        self.settings = settings
        self.started = time.perf_counter()
        self.views = {
            role: ByteView(settings.tries[role], settings.tolerance) for role in settings.roles
        }
        self.text = bytearray()
        self.trace: list[TraceRow] = []
        self.finished: FinishReason | None = None
        self.error = ""
        self.known: dict[str, dict[tuple[int, ...], TokenLaw]] = {role: {} for role in self.views}
        """Laws made ahead, by role and context."""
        self.draft: list[int] = []
        """Symbols that the student would draw next, for whose contexts laws were made ahead."""
        self.accepted = 0
        """Of all drafts, the symbols that were drawn."""
        self._restarts: dict[str, int] = {}
        """By role, the bytes of the text when its view was last started again."""
        self._forced: list[int] | None = None if settings.force_first_token else []
        self.key = request.noise_key

    @property
    def prompts_are_read(self) -> bool:
        """Every model has given a law after its prompt."""
        return all(view.evaluations for view in self.views.values())

    @property
    def blocked(self) -> bool:
        """A model has to run before the next symbol."""
        return any(view.wanted for view in self.views.values())

    def receive(self, role: str, law: TokenLaw) -> None:
        """The law of the context that a model's view wants first."""
        self.views[role].receive(law)
        self.settle()

    def settle(self) -> None:
        """Give the views what is known ahead, and start those again that have died."""
        for role, view in self.views.items():
            known = self.known[role]
            while not self.finished:
                if view.is_dead:
                    self._restart(role, view)
                elif view.wanted and view.wanted[-1].context in known:
                    view.receive(known[view.wanted[-1].context])
                else:
                    break

    def _restart(self, role: str, view: ByteView) -> None:
        """No tokens that are followed write the text: go on from those of the tokenizer.

        So it is where the other model alone drew: a forced first token, supports that do not meet.
        """
        whole = whole_characters(bytes(self.text))
        ids = self.settings.texts[role].ids(whole)
        if ids is None or self._restarts.get(role) == len(self.text):
            self.fail(f"no tokens of the {role} write the text that was drawn: {self.text!r}")
            return
        self._restarts[role] = len(self.text)
        view.restart(tuple(ids), len(whole))

    def wanted(self, role: str) -> tuple[int, ...] | None:
        """The context whose law the view of a model needs next."""
        wanted = self.views[role].wanted
        return wanted[-1].context if wanted else None

    def length(self, role: str) -> int:
        """Tokens of the longest context of a model that is followed, prompt included."""
        view = self.views[role]
        followed = [each.context for each in view.live] + [each.context for each in view.wanted]
        return len(self.request.prompt_ids(role)) + max(map(len, followed), default=0)

    def place(self) -> Place:
        """Where the next symbol stands."""
        if self._forced is None:
            self._forced = self._first_token()
        forced = self._forced[0] if self._forced else None
        return Place(self.key, len(self.text), self._tokens_followed(), forced)

    def append(self, symbol: int, trace: TraceRow) -> None:
        """The text goes on with a symbol, or ends."""
        self.trace.append(trace)
        if self._forced:
            self._forced.pop(0)
        if symbol == END:
            self.finished = "stop"
            return
        self.text.append(symbol)
        self._compare_draft(symbol)
        for view in self.views.values():
            view.push(symbol)
        self.settle()
        if not self.finished and self._context_is_full():
            self.finished = "length"

    def _compare_draft(self, symbol: int) -> None:
        """A draft ends with its first symbol that is not drawn, and with it what was made ahead."""
        if self.draft and self.draft[0] == symbol:
            self.draft.pop(0)
            self.accepted += 1
        else:
            self.draft.clear()
            for known in self.known.values():
                known.clear()

    def check(self) -> None:
        """End a row that waits for no model and is long enough."""
        if self._is_long():
            self.finished = "length"

    def _tokens_followed(self) -> int:
        """Whole student tokens of the text, as its view reads it; 0 without a view."""
        view = self.views.get("student")
        return len(view.leading.context) if view is not None else 0

    def _context_is_full(self) -> bool:
        """A model's context has no room for another token."""
        limits = self.settings.contexts.items()
        return any(limit is not None and self.length(role) >= limit for role, limit in limits)

    def _is_long(self) -> bool:
        """The text has more student tokens than it may: only then the last of them is whole."""
        most = self.request.max_new_tokens
        if len(self.text) <= most:
            return False  # a token has at least a byte
        if "student" in self.views:
            if self._tokens_followed() < most:
                return False
        elif len(self.text) % _BYTES_BETWEEN_COUNTS:
            return False
        count = self.settings.texts["student"].count(bytes(self.text))
        return count is None or count > most

    def _first_token(self) -> list[int]:
        """Symbols of the teacher's first token, drawn from its law of tokens."""
        law = self.views["teacher"].live[0].law
        trie = self.settings.tries["teacher"]
        ids = torch.from_numpy(np.append(trie.ids, law.end_id))[None]
        noise = gumbel(keys_tensor([self.key]), torch.tensor([0]), ids)[0].numpy()
        with np.errstate(divide="ignore"):
            scores = np.append(law.log_p, np.log(law.end)) + noise
        rank = int(scores.argmax())
        return list(trie.words[rank]) if rank < len(trie.ids) else [END]

    # the completion

    def fail(self, error: str) -> None:
        """Nothing more can be drawn."""
        self.finished = "error"
        self.error = error

    def completion(self) -> Completion:
        """What was drawn, in the student's tokens."""
        assert self.finished is not None
        most, student = self.request.max_new_tokens, self.settings.texts["student"]
        ids, text, canonical = student.tokens(bytes(self.text), self._followed(), most)
        ended = self.finished == "stop" and len(ids) < most and len(text) == len(self.text)
        reason: FinishReason = "length" if self.finished == "stop" and not ended else self.finished
        trace = token_trace(self.trace, ids, student.table, ended)
        kept = self.trace[: len(text) + ended]
        return Completion(
            request=self.request,
            token_ids=(*ids, self._end_id()) if ended else tuple(ids),
            finish_reason=reason,
            trace=trace,
            error=self.error,
            seconds=time.perf_counter() - self.started,
            byte_level=ByteLevel(
                text=text.decode(),
                lost={role: view.lost for role, view in self.views.items()},
                canonical=canonical,
                trace=TokenTrace.from_rows(kept),
            ),
        )

    def _followed(self) -> Sequence[int]:
        """Ids of the student's hypothesis with most mass, where the text ended of those of all."""
        view = self.views.get("student")
        if view is None or not view.live:
            return ()
        closed = view.closed
        return (closed if closed and self.finished == "stop" else view.leading).context

    def _end_id(self) -> int:
        """The end token that the student finds likeliest."""
        view = self.views.get("student")
        closed = view.closed if view is not None else None
        return closed.law.end_id if closed is not None else self.settings.end_id
