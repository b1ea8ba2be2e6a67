"""Ids of tokens -> pieces of text. Tokens that are parts of one character make one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

__all__ = ["Decode", "Piece", "TokenReader", "characters"]

Decode = Callable[[list[int]], str]
"""Text of ids, special tokens included."""

_UNFINISHED = "\ufffd"
_MOST_PARTS = 8  # tokens that may be parts of one character: UTF-8 has at most 4 bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """A text and the tokens that it stands for."""

    text: str
    start: int
    """Index of the first token."""
    count: int = 1
    """Number of tokens."""


@dataclass
class TokenReader:
    """The texts of the tokens of one tokenizer."""

    decode: Decode
    before: tuple[int, ...] = ()
    """Ids of a letter. Decoders drop a space at the start of a text, so one is put before it."""
    _texts: dict[int, str] = field(default_factory=dict, repr=False)

    def text(self, token: int) -> str:
        """What one token writes. Of a part of a character, U+FFFD and the id."""
        if token not in self._texts:
            start, whole = self.decode([*self.before]), self.decode([*self.before, token])
            text = whole.removeprefix(start)
            self._texts[token] = f"{text}{token}" if _UNFINISHED in text else text
        return self._texts[token]

    def split(self, ids: Sequence[int]) -> list[Piece]:
        """The pieces of a text that follows other text. Together they have all tokens."""
        pieces: list[Piece] = []
        context = [*self.before]
        known = self.decode(context)
        waiting: list[int] = []
        for place, token in enumerate(ids):
            waiting.append(token)
            text = self._after(known, context, waiting)
            is_last = place == len(ids) - 1
            if text.endswith(_UNFINISHED) and len(waiting) < _MOST_PARTS and not is_last:
                continue
            pieces.append(Piece(text, place + 1 - len(waiting), len(waiting)))
            context, waiting = waiting, []
            known = self.decode(context)
        return _without_empty(pieces)

    def _after(self, known: str, context: list[int], waiting: list[int]) -> str:
        whole = self.decode([*context, *waiting])
        return whole[len(known) :] if whole.startswith(known) else self.decode(waiting)


def characters(text: str) -> list[Piece]:
    """The characters of a text, each with its bytes in UTF-8."""
    pieces, start = [], 0
    for character in text:
        count = len(character.encode("utf-8", "surrogatepass"))
        pieces.append(Piece(character, start, count))
        start += count
    return pieces


def _without_empty(pieces: list[Piece]) -> list[Piece]:
    """Tokens that write nothing are joined with the piece before them, or else after them."""
    kept: list[Piece] = []
    for piece in pieces:
        if kept and (not piece.text or not kept[-1].text):
            last = kept[-1]
            kept[-1] = replace(last, text=last.text + piece.text, count=last.count + piece.count)
        else:
            kept.append(piece)
    return kept
