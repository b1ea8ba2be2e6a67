"""What there is to know of the data before training: counts and means, in the order of the card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from optimal_sampling.records.export.options import ExportOptions
from optimal_sampling.records.export.reading import Entry
from optimal_sampling.records.export.rows import Row
from optimal_sampling.records.export.spans import longest_common_span, words
from optimal_sampling.records.run_folder import Totals
from optimal_sampling.records.schema import Record

__all__ = ["Coverage", "Exported", "Line", "Source", "percent"]

Line = tuple[str, str]
"""A name and its value."""

NEAR_COPY_WORDS = 8
"""Words of the longest common span from which a completion can be a near-copy."""
NEAR_COPY_SHARE = 0.5
"""Share of the words that the teacher was shown, in one span, that makes a near-copy."""

SHOWN = 10
"""Rows that are named."""


def percent(count: int, total: int) -> str:
    """`12.5% (1 of 8)`."""
    return f"{100 * count / total:.1f}% ({count} of {total})" if total else "none"


@dataclass(frozen=True)
class Source:
    """The records of the runs, before anything is left out."""

    records: int
    prompts: int
    failed: int
    truncated: int
    verdicts: Counter[str]
    ungraded: int
    duplicates: int
    """Completions that equal an earlier one of the same prompt."""
    tokens: int

    @classmethod
    def of(cls, entries: list[Entry], failed: int) -> Source:
        """The counts of entries."""
        verdicts = Counter(each.verdict for each in entries if each.verdict is not None)
        distinct = {(each.prompt, each.completion) for each in entries}
        return cls(
            records=len(entries),
            prompts=len({each.prompt for each in entries}),
            failed=failed,
            truncated=sum(each.truncated for each in entries),
            verdicts=Counter(map(str, verdicts.elements())),
            ungraded=sum(each.verdict is None for each in entries),
            duplicates=len(entries) - len(distinct),
            tokens=sum(each.tokens for each in entries),
        )

    @property
    def judged(self) -> int:
        """Records that were graded against a usable reference."""
        return sum(self.verdicts.values()) - self.verdicts["skipped"]

    def lines(self) -> Iterator[Line]:
        """As shown."""
        yield "records", f"{self.records} of {self.prompts} prompts, {self.tokens} tokens"
        if self.failed:
            yield "failed samples", str(self.failed)
        if self.judged:
            yield "share right", percent(self.verdicts["correct"], self.judged)
        else:
            yield "share right", "not known: no record was graded (optimal-sampling verify)"
        if self.verdicts:
            counts = ", ".join(f"{name} {n}" for name, n in sorted(self.verdicts.items()))
            yield "verdicts", counts + (f", not graded {self.ungraded}" if self.ungraded else "")
        yield "truncated", percent(self.truncated, self.records)
        yield "duplicates of a prompt", percent(self.duplicates, self.records)


@dataclass(frozen=True)
class Coverage:
    """Of how many problems there is a right completion."""

    problems: int
    """Problems with a graded completion."""
    solved: int
    student: str | None
    """The run of the student alone; None where there is none."""
    hard: int = 0
    """Problems of both runs that the student alone never solves."""
    hard_solved: int = 0

    @classmethod
    def of(
        cls, entries: Iterable[Entry], student: Iterable[Entry] | None, student_name: str | None
    ) -> Coverage:
        """Coverage by the runs' records, whatever is exported of them."""
        solved = _solved(entries)
        alone = _solved(student or [])
        hard = [prompt for prompt, right in alone.items() if not right and prompt in solved]
        return cls(
            problems=len(solved),
            solved=sum(solved.values()),
            student=student_name if alone else None,
            hard=len(hard),
            hard_solved=sum(solved[prompt] for prompt in hard),
        )

    def lines(self) -> Iterator[Line]:
        """As shown; nothing where nothing was graded."""
        if not self.problems:
            return
        yield "problems with a right completion", percent(self.solved, self.problems)
        name = "of those that the student alone never solves"
        if self.student is None:
            yield name, "not known: no graded run with --mode student is beside this one"
        else:
            yield name, f"{percent(self.hard_solved, self.hard)}, student run {self.student}"


def _solved(entries: Iterable[Entry]) -> dict[bytes, bool]:
    """By prompt, whether one of its graded completions is right."""
    found: dict[bytes, bool] = {}
    for entry in entries:
        if entry.verdict not in (None, "skipped"):
            found[entry.prompt] = found.get(entry.prompt, False) or entry.verdict == "correct"
    return found


@dataclass
class Exported:
    """Counts and means over the exported rows."""

    options: ExportOptions
    drawn_at: str = ""
    """How the student that log_p_student is about differs from the student at temperature 1."""
    old_support: bool = False
    """Whether a run within a teacher's support may hold log_p_student of the restricted student."""
    rows: Counter[str] = field(default_factory=Counter)
    """By split."""
    prompts: set[bytes] = field(default_factory=set)
    trained_tokens: int = 0
    """Tokens with loss: completions and their end tokens."""
    longest: int = 0
    """Most tokens of a row, prompt and completion together."""
    changed: int = 0
    """Rows whose text has other ids than were drawn."""
    changed_rows: list[str] = field(default_factory=list)
    """The first of them: id and sample."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Records of which no row could be made, by reason."""
    totals: Totals = field(default_factory=Totals)
    hints: int = 0
    """Rows whose teacher was shown more than the student."""
    near_copies: int = 0
    span_words: int = 0
    span_share: float = 0.0
    longest_span: int = 0
    scores: list[tuple[float, int]] = field(default_factory=list)
    """Log-probability under the student, and number of tokens, of the rows that were scored."""

    def add(self, split: str, entry: Entry, record: Record, row: Row) -> None:
        """Count a row."""
        self.rows[split] += 1
        self.prompts.add(entry.prompt)
        if self.options.format == "prompts":
            return
        self.trained_tokens += len(row.completion_ids)
        self.longest = max(self.longest, len(row.prompt_ids) + len(row.completion_ids))
        if not row.survives:
            self.changed += 1
            if self.changed <= SHOWN:
                self.changed_rows.append(f"{record['id']}:{record['sample_index']}")
        if self.options.draws:
            self.totals.add(record)
            self._add_span(row)

    def _add_span(self, row: Row) -> None:
        hint = words(row.hint)
        if not hint:
            return
        span = longest_common_span(words(row.text), hint)
        self.hints += 1
        self.span_words += span
        self.span_share += span / len(hint)
        self.longest_span = max(self.longest_span, span)
        self.near_copies += span >= max(NEAR_COPY_WORDS, NEAR_COPY_SHARE * len(hint))

    @property
    def count(self) -> int:
        """Rows of all splits."""
        return self.rows.total()

    @property
    def student_nll(self) -> float | None:
        """Measured: nats per token of the scored rows; None where none was scored."""
        tokens = sum(count for _, count in self.scores)
        return -sum(score for score, _ in self.scores) / tokens if tokens else None

    def lines(self) -> Iterator[Line]:
        """As shown."""
        splits = ", ".join(f"{name} {count}" for name, count in sorted(self.rows.items()))
        yield "rows", f"{splits}; {len(self.prompts)} prompts"
        if self.options.format == "prompts":
            return
        mean = self.trained_tokens / max(self.count, 1)
        yield "tokens with loss", f"{self.trained_tokens}, {mean:.1f} per row"
        yield "longest row", f"{self.longest} tokens with its prompt"
        yield from self._text_lines()
        yield from self._student_lines()
        if self.options.draws:
            yield from self._mixture_lines()
            yield from self._span_lines()

    def _text_lines(self) -> Iterator[Line]:
        if self.options.format == "text":
            share = percent(self.changed, self.count)
            yield "rows whose text has other ids than were drawn", share
            if self.changed_rows:
                more = ", ..." if self.changed > SHOWN else ""
                yield "these are (id:sample_index)", ", ".join(self.changed_rows) + more
        for reason, count in self.left_out.items():
            yield f"left out: {reason}", str(count)

    def _student_lines(self) -> Iterator[Line]:
        name = "student NLL, nats/token, before training"
        measured = self.student_nll
        if measured is not None:
            yield name, f"{measured:.4f} (measured on {len(self.scores)} rows)"
        recorded = self.totals.mean("log_p_student")
        if recorded is not None:
            note = self.drawn_at
            if self.old_support and self.totals.mean("vetoed") is None:
                note += " (within the teacher's support)"
            yield "student NLL while drawing, nats/token", f"{-recorded:.4f}{note}"
        if measured is None and recorded is None:
            yield name, "not known: --score-rows 200 measures it"

    def _mixture_lines(self) -> Iterator[Line]:
        for name, title in _MEANS.items():
            mean = self.totals.mean(name)
            if mean is not None:
                yield title, f"{mean:.4f}"
        finishes = sorted(self.totals.finish_reasons.items())
        yield "finish reasons", ", ".join(f"{name} {count}" for name, count in finishes)

    def _span_lines(self) -> Iterator[Line]:
        if not self.hints:
            yield "near-copies of the shown solution", "none was shown"
            return
        yield "near-copies of the shown solution", percent(self.near_copies, self.hints)
        yield (
            "longest span in common with it",
            f"mean {self.span_words / self.hints:.1f} words, {self.span_share / self.hints:.1%} "
            f"of it; most {self.longest_span} words",
        )


_MEANS = {
    "alpha_mean": "alpha mean",
    "alpha_weighted": "alpha where the models differ",
    "clamped_share": "clamped share",
    "chernoff": "Chernoff information, nats/token",
    "kl_student": "KL(q, student), nats/token",
    "kl_teacher": "KL(q, teacher), nats/token",
    "vetoed": "vetoed share of the student's mass",
}
