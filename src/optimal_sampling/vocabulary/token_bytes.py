"""The bytes of every token of a tokenizer, from its decoder.

For tokenizers whose decoder joins the tokens' bytes: byte-level BPE, and SentencePiece with its
spaces and byte pieces. Decoders that look at neighbouring tokens (WordPiece) have no such table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from optimal_sampling.errors import TokenizerMismatchError

__all__ = ["TokenBytes", "byte_of_letter", "continued_ids", "token_bytes"]

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PROBES = (
    "The quick brown fox; 12345 + 6.78 = x_1, don't f(x)\n\n\tend",
    "na\u00efve caf\u00e9, \u4f60\u597d\uff0c\u4e16\u754c, \u041f\u0440\u0438\u0432\u0435\u0442",
)
_FIRST_LETTERS = ("", "\n", "a", "\u3002")
"""What a text may be put behind, so that its first token is that of a text that goes on."""

Piece = Callable[[str], "str | bytes"]


@dataclass(frozen=True)
class TokenBytes:
    """What each token id of one model writes."""

    of_id: tuple[bytes | None, ...]
    """None: control tokens, ids that the tokenizer does not know, empty tokens."""
    end_ids: frozenset[int]
    """Ids at which the model ends a text. They have no bytes."""
    adds_space: bool = False
    """The tokenizer puts a space before a text, which its decoder takes away again."""

    @property
    def size(self) -> int:
        """Number of ids; rows of logits from there on mean nothing."""
        return len(self.of_id)

    def cut(self, rows: int | None) -> TokenBytes:
        """The ids that the model has logits of."""
        ends = frozenset(i for i in self.end_ids if rows is None or i < rows)
        return replace(self, of_id=self.of_id[:rows], end_ids=ends)

    def join(self, ids: Iterable[int]) -> bytes:
        """The bytes of a text. Control tokens write nothing."""
        return b"".join(self.of_id[index] or b"" for index in ids)


def token_bytes(tokenizer: Any, end_ids: Set[int], kept: Set[str] = frozenset()) -> TokenBytes:
    """The table of a tokenizer. `kept`: special tokens that are part of the text nevertheless.

    Raises TokenizerMismatchError where tokens have no bytes of their own.
    """
    piece, adds_space = _piece_decoder(tokenizer)
    vocabulary = tokenizer.get_vocab()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    table: list[bytes | None] = [None] * (1 + max(vocabulary.values()))
    for text, index in vocabulary.items():
        if index in end_ids or (index in special and text not in kept):
            continue
        written = text if index in added else piece(text)
        table[index] = (written.encode() if isinstance(written, str) else written) or None
    found = TokenBytes(tuple(table), frozenset(i for i in end_ids if i < len(table)), adds_space)
    _check(tokenizer, found)
    return found


def continued_ids(tokenizer: Any, table: TokenBytes, text: str) -> list[int] | None:
    """The tokenizer's own ids of a text that follows other text; None where it changes the text.

    Special tokens that are spelled out in the text are text.
    """
    wanted = text.encode()
    for letter in _FIRST_LETTERS:
        ids = list(
            tokenizer(letter + text, add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
        )
        rest = _after(ids, table, letter.encode(), wanted)
        if rest is not None:
            return rest
    return None


def _after(ids: list[int], table: TokenBytes, letter: bytes, wanted: bytes) -> list[int] | None:
    """The ids after those of `letter`, where these are whole tokens and the rest is `wanted`."""
    if any(index >= table.size or table.of_id[index] is None for index in ids):
        return None
    starts = {letter, b" " + letter} if table.adds_space and letter else {letter}
    count, written = 0, b""
    while written not in starts:
        if count == len(ids) or len(written) > len(letter) + 1:
            return None
        written += table.of_id[ids[count]] or b""
        count += 1
    return ids[count:] if table.join(ids[count:]) == wanted else None


def _check(tokenizer: Any, table: TokenBytes) -> None:
    """Encode some texts and compare the bytes of their tokens with them."""
    for text in _PROBES:
        if continued_ids(tokenizer, table, text) is None:
            raise TokenizerMismatchError(
                f"{type(tokenizer).__name__} does not keep texts as they are: the bytes of its "
                f"tokens for {text[:20]!r}... are not those of the text, so the model cannot be "
                "mixed with one of another tokenizer. Take two models of one family."
            )


def _piece_decoder(tokenizer: Any) -> tuple[Piece, bool]:
    """What one token writes, and whether the decoder drops a space at the start of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerMismatchError(
            f"{type(tokenizer).__name__} has no fast tokenizer, from whose decoder the bytes of "
            "its tokens could be read; save it with a tokenizer.json"
        )
    steps = [*_steps(json.loads(backend.to_str())["decoder"])]
    kinds = {step["type"] for step in steps}
    unknown = kinds - {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
    if unknown or not kinds:
        raise TokenizerMismatchError(
            f"the decoder of {type(tokenizer).__name__} ({', '.join(sorted(unknown)) or 'none'}) "
            "does not join the bytes of tokens, so the model cannot be mixed with one of another "
            "tokenizer. Take two models of one family."
        )
    if "ByteLevel" in kinds:
        return _byte_level, False
    marks = [
        (step["pattern"].get("String", ""), step["content"])
        for step in steps
        if step["type"] == "Replace"
    ]
    marks += [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]
    schemes = [step.get("prepend_scheme") for step in steps if step["type"] == "Metaspace"]
    adds_space = "Strip" in kinds or any(scheme != "never" for scheme in schemes)

    def piece(text: str) -> str | bytes:
        if "ByteFallback" in kinds and (found := _BYTE_PIECE.fullmatch(text)):
            return bytes([int(found[1], 16)])
        for old, new in marks:
            text = text.replace(old, new) if old else text
        return text

    return piece, adds_space


def _steps(decoder: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for each in decoder["decoders"]:
            yield from _steps(each)
    else:
        yield decoder


def _byte_level(text: str) -> bytes:
    table = byte_of_letter()
    if any(letter not in table for letter in text):
        return text.encode()
    return bytes(table[letter] for letter in text)


@cache
def byte_of_letter() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return {chr(byte if byte in printable else next(stand_ins)): byte for byte in range(256)}
