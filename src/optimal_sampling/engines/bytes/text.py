"""A text that was drawn byte by byte -> the student's tokens of it, and sums over their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from optimal_sampling.engines.bytes.mixing import TraceRow
from optimal_sampling.engines.bytes.utf8 import whole_characters
from optimal_sampling.types import TRACE_FIELDS, TokenTrace
from optimal_sampling.vocabulary import TokenBytes, continued_ids

__all__ = ["TokenizedText", "token_trace"]


class TokenizedText:
    """The tokens that a model's tokenizer makes of texts that follow a prompt."""

    def __init__(self, tokenizer: Any, table: TokenBytes) -> None:
        self.tokenizer = tokenizer
        self.table = table

    def count(self, text: bytes) -> int | None:
        """Tokens of the whole characters; None where the tokenizer changes the text."""
        ids = self.ids(whole_characters(text))
        return None if ids is None else len(ids)

    def tokens(
        self, text: bytes, followed: Sequence[int], most: int
    ) -> tuple[list[int], bytes, bool]:
        """At most `most` ids, the bytes that they write, and whether they are the tokenizer's own.

        `followed`: ids of the student's view, taken where the tokenizer changes the text. An
        incomplete character at the end is cut.
        """
        text = whole_characters(text)
        while True:
            ids = self.ids(text)
            if ids is None:
                return self._followed(followed, most)
            if len(ids) <= most:
                return ids, text, True
            text = whole_characters(self.table.join(ids[:most]))

    def ids(self, text: bytes) -> list[int] | None:
        """Of a text of whole characters; None where the tokenizer changes it."""
        return continued_ids(self.tokenizer, self.table, text.decode())

    def of_characters(self, text: bytes) -> list[int] | None:
        """The ids of the whole characters; None where the text begins within a character."""
        try:
            return self.ids(whole_characters(text))
        except UnicodeDecodeError:
            return None

    def _followed(self, ids: Sequence[int], most: int) -> tuple[list[int], bytes, bool]:
        """As many ids of the view as end with a whole character."""
        kept = list(ids[:most])
        while True:
            text = self.table.join(kept)
            if text == whole_characters(text):
                return kept, text, False
            kept.pop()


def token_trace(
    rows: Sequence[TraceRow], ids: Sequence[int], table: TokenBytes, ended: bool
) -> TokenTrace:
    """`rows`: of every byte, and where the text `ended` of its end. One row per id.

    Logarithms of probabilities, KLs, entropy and curvature are summed over the bytes of a token,
    both ESS multiplied; alpha and the clamped share are means; a fallback at one byte is one;
    vetoed is the mass that some byte of the token vetoed.
    """
    first, found = 0, []
    for index in ids:
        width = len(table.of_id[index] or b"")
        found.append(_combined(rows[first : first + width]))
        first += width
    if ended:
        found.append(rows[first])
    return TokenTrace.from_rows(found)


def _combined(rows: Sequence[TraceRow]) -> TraceRow:
    columns = zip(*rows, strict=True)
    pairs = zip(TRACE_FIELDS, columns, strict=True)
    return tuple(_COMBINE.get(name, math.fsum)(column) for name, column in pairs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


_COMBINE: dict[str, Callable[[Sequence[float]], float]] = {
    "alpha": _mean,
    "clamped": _mean,
    "ess_student": math.prod,
    "ess_teacher": math.prod,
    "fallback": max,
    "vetoed": lambda column: 1 - math.prod(1 - value for value in column),
}
