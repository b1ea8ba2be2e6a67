"""Outputs of the Python classes as coloured text, which notebooks show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from optimal_sampling.spans import SpannedText, TokenReader, page_html, spanned_tokens
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["ShownRow", "rows_html", "token_reader"]

_SHOWN = 10


class ShownRow(NamedTuple):
    """A completion, and what was found out about its tokens."""

    about: str
    """What tells it from the others."""
    ids: Sequence[int]
    """The end token included."""
    columns: Mapping[str, Sequence[float]]
    """One number per token, by the names of METRICS; NaN where there is none."""
    ends: bool
    """Whether the last token is the end token."""


def token_reader(vocabulary: Vocabulary) -> TokenReader:
    """The texts of the tokens, as the student's tokenizer has them."""
    tokenizer = vocabulary.student_tokenizer
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    return TokenReader(decode, tuple(letter))


def rows_html(reader: TokenReader | None, total: int, rows: Iterable[ShownRow]) -> str:
    """The first of `total` completions."""
    shown = [(row.about, _spanned(reader, row)) for row in islice(rows, _SHOWN)]
    return page_html(f"the first {len(shown)} of {total} completions", shown)


def _spanned(reader: TokenReader | None, row: ShownRow) -> SpannedText:
    """A completion in pieces."""
    if reader is None:
        return SpannedText([], "none", note="a pickled output has no tokenizer")
    known = {
        name: [value if math.isfinite(value) else None for value in column]
        for name, column in row.columns.items()
    }
    return spanned_tokens(reader, row.ids, known, ends=row.ends)
