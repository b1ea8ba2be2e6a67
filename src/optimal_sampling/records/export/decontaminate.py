"""Which prompts share 8 words in a row with a question of a benchmark."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from optimal_sampling.errors import DatasetError, PromptError
from optimal_sampling.prompts.rows import conversation_of

__all__ = ["NGRAM", "Questions", "RowsOf", "load_questions", "problem_text"]

NGRAM = 8
"""Words in a row; of a shorter question, all of its words."""

# Thai, Lao, Burmese, Khmer, kana, Chinese characters: scripts without spaces between words
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_LETTER = re.compile(rf"[{_UNSPACED}]")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _ngrams(words: list[str]) -> Iterator[str]:
    """From each word on, as many as count for `NGRAM` words.

    Of scripts without spaces a letter counts for half a word.
    """
    counts = [1 if _LETTER.match(word) else 2 for word in words]
    end = total = 0
    for start, count in enumerate(counts):
        while total < 2 * NGRAM and end < len(words):
            total += counts[end]
            end += 1
        if total < 2 * NGRAM:
            return
        yield " ".join(words[start:end])
        total -= count


@dataclass
class Questions:
    """The questions of benchmarks, as sets of n-grams."""

    _by_ngram: dict[str, str] = field(default_factory=dict)
    _short: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    """Number of questions by benchmark."""

    def add(self, benchmark: str, texts: Iterable[str]) -> None:
        """Questions of a benchmark. Raises DatasetError where there are none."""
        count = 0
        for text in texts:
            count += 1
            words = _words(text)
            ngrams = list(_ngrams(words))
            if not ngrams:
                self._short.setdefault(" ".join(words), benchmark)
            for ngram in ngrams:
                self._by_ngram.setdefault(ngram, benchmark)
        if not count:
            raise DatasetError(f"the benchmark {benchmark} holds no questions")
        self.counts[benchmark] = count

    def match(self, text: str) -> str | None:
        """The benchmark whose question overlaps with a text; None where none does."""
        words = _words(text)
        if next(_ngrams(words), None) is None:
            return self._short.get(" ".join(words))
        return next((self._by_ngram[ngram] for ngram in _ngrams(words) if ngram in self), None)

    def __contains__(self, ngram: str) -> bool:
        return ngram in self._by_ngram


def problem_text(row: Mapping[str, Any], prompt_column: str | None = None) -> str | None:
    """Text of the last user turn of a row; None where it has none."""
    try:
        return conversation_of(row, prompt_column).problem
    except PromptError:
        return None


RowsOf = Callable[[str], Iterable[Mapping[str, Any]]]
"""The rows of a benchmark: of a file, a folder of files, a hub id, or a known name."""


def load_questions(benchmarks: Iterable[str], rows_of: RowsOf) -> Questions:
    """The questions of benchmarks. Raises DatasetError."""
    questions = Questions()
    for benchmark in benchmarks:
        questions.add(benchmark, _texts(benchmark, rows_of(benchmark)))
    return questions


def _texts(benchmark: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        try:
            yield conversation_of(row).problem
        except PromptError as error:
            raise DatasetError(f"benchmark {benchmark}, row {number}: {error}") from error
