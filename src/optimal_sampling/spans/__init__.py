"""The text of a completion, cut where its tokens begin, and as coloured HTML or terminal text.

    tokenizer   the tokenizer of a model by name, from its `tokenizer.json` alone
    pieces      ids of tokens -> pieces of text; tokens that are parts of one character are joined
    coloured    the pieces of a record, each with its diagnostics
    top_tokens  the likeliest tokens of student, teacher and q*, where a record has them
    html        for notebooks
    terminal    for terminals

No torch, no Transformers.
"""

from optimal_sampling.spans.coloured import (
    METRICS,
    Metric,
    SpannedText,
    Unit,
    spanned_text,
    spanned_tokens,
)
from optimal_sampling.spans.html import page_html, spans_html
from optimal_sampling.spans.pieces import Piece, TokenReader
from optimal_sampling.spans.terminal import rich_text, scale_text, visible
from optimal_sampling.spans.tokenizer import reader_of, run_reader

__all__ = [
    "METRICS",
    "Metric",
    "Piece",
    "SpannedText",
    "TokenReader",
    "Unit",
    "page_html",
    "reader_of",
    "rich_text",
    "run_reader",
    "scale_text",
    "spanned_text",
    "spanned_tokens",
    "spans_html",
    "visible",
]
