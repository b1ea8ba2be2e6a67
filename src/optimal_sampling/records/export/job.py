"""Run folders -> a training set: index, select, write, judge."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimal_sampling.errors import DatasetError
from optimal_sampling.records.export.card import (
    Section,
    card,
    generate_command,
    made_with,
    train_command,
)
from optimal_sampling.records.export.decontaminate import (
    Questions,
    RowsOf,
    load_questions,
    problem_text,
)
from optimal_sampling.records.export.folder import ParquetShards, check_target, new_folder
from optimal_sampling.records.export.judgement import Coverage, Exported, Source
from optimal_sampling.records.export.options import ExportOptions
from optimal_sampling.records.export.reading import (
    Entry,
    Run,
    index,
    open_runs,
    records_of,
    student_run,
)
from optimal_sampling.records.export.rows import Form, form_of
from optimal_sampling.records.export.selection import Selection, is_validation, select
from optimal_sampling.records.export.tokens import StudentTokens, vocabulary_hash
from optimal_sampling.records.store import read_json

if TYPE_CHECKING:
    from optimal_sampling.vocabulary import Vocabulary

__all__ = ["Report", "Tools", "export"]

Scored = tuple[list[int], list[int]]
"""Ids of a prompt and of the completion that follows it."""


@dataclass(frozen=True)
class Tools:
    """What this folder may not import: models, and datasets."""

    vocabulary: Callable[[str, bool], Vocabulary]
    """That of a model by name, with or without code that comes with it."""
    rows_of: RowsOf
    """The rows of a benchmark."""
    score: Callable[[str, bool, Iterable[Scored]], Iterator[float]]
    """Log-probabilities of completions under a model by name, at temperature 1."""
    say: Callable[[str], None] = field(default=lambda line: None)
    """Shows a line of progress."""


@dataclass(frozen=True)
class Report:
    """What was exported."""

    folder: Path
    rows: Mapping[str, int]
    """By split."""
    sections: list[Section]
    """What there is to know of the data, by title."""
    command: str | None
    """TRL's command line; None where rows have no completions."""


def export(options: ExportOptions, tools: Tools, commands: Iterable[str] = ()) -> Report:
    """Write the training set of an export.

    `commands`: command lines for the card. Raises RunFolderError, DatasetError, ConfigError,
    TokenizerMismatchError, StorageError; in each case nothing new has the name of the folder.
    """
    target = Path(str(options.output_dir))
    check_target(target, overwrite=options.overwrite)
    runs = open_runs(options)
    entries, failed = index(runs)
    if not entries:
        raise DatasetError(f"{', '.join(options.runs)}: no good record to export ({failed} failed)")
    tools.say(f"{len(entries)} good records in {', '.join(options.runs)}")
    questions = load_questions(options.decontaminate, tools.rows_of)
    selection = select(entries, options, _contaminated(entries, runs, questions))
    model = options.model or str(runs[0].compared.get("student"))
    vocabulary = tools.vocabulary(model, options.trust_remote_code)
    tokens = StudentTokens(model, vocabulary, selection.entries)
    _, first = next(records_of(selection.entries[:1]))
    form = form_of(options, tokens, runs, first)
    writing = _Writing(options, form, tools)
    coverage = _coverage(options, runs, entries)
    with new_folder(target, overwrite=options.overwrite) as folder:
        exported = writing.run(folder, selection.entries)
        sections = _sections(options, runs, selection, exported, Source.of(entries, failed))
        sections[0][1].extend(coverage.lines())
        sections += _more(questions, tokens, runs)
        command = train_command(options, tokens, exported.longest)
        made = [generate_command(run) for run in runs]
        shown = [*made, *commands, *([command] if command else [])]
        text = card(options, runs, sections, shown, folder)
        (folder / "README.md").write_text(text, "utf-8", errors="backslashreplace")
        _write_summary(folder, options, exported, tokens, sections)
    return Report(target, dict(exported.rows), sections, command)


def _contaminated(
    entries: Iterable[Entry], runs: list[Run], questions: Questions
) -> dict[bytes, str]:
    """By prompt, the benchmark that its problem overlaps with."""
    if not questions.counts:
        return {}
    found: dict[bytes, str] = {}
    for entry, record in records_of(entries):
        text = problem_text(record["row"], runs[entry.run].compared.get("prompt_column"))
        benchmark = questions.match(text) if text else None
        if benchmark is not None:
            found[entry.prompt] = benchmark
    return found


class _Writing:
    """The second pass over the records: rows into files, and counts."""

    def __init__(self, options: ExportOptions, form: Form, tools: Tools) -> None:
        self.options = options
        self.form = form
        self.tools = tools
        self.exported = Exported(
            options, drawn_at=_drawn_at(form.runs), old_support=_within_support(form.runs)
        )

    def run(self, folder: Path, entries: list[Entry]) -> Exported:
        """Write all splits."""
        schema = self.form.schema()
        shards = {name: ParquetShards(folder, name, schema) for name in ("train", "validation")}
        scored: list[Scored] = []
        step = max(1, len(entries) // max(1, self.options.score_rows))
        pace = _Pace(len(entries), self.tools.say)
        try:
            for number, (entry, record) in enumerate(records_of(entries)):
                row = self.form.row(entry, record)
                if isinstance(row, str):
                    self.exported.left_out[row] += 1
                    continue
                validation = is_validation(entry.prompt, self.options.validation_share)
                split = "validation" if validation else "train"
                shards[split].add(row.columns)
                self.exported.add(split, entry, record, row)
                if number % step == 0 and len(scored) < self.options.score_rows:
                    scored.append((row.prompt_ids, row.completion_ids))
                pace.show(number + 1)
            for shard in shards.values():
                shard.close()
        except BaseException:
            for shard in shards.values():
                shard.abandon()
            raise
        self._check_rows()
        self._score(scored)
        return self.exported

    def _check_rows(self) -> None:
        if self.exported.rows["train"]:
            return
        reasons = [f"{count} records: {why}" for why, count in self.exported.left_out.items()]
        if self.exported.count:
            reasons.append(f"all {self.exported.count} rows are in the validation split")
        message = f"nothing to train {self.form.tokens.model!r} on: {'; '.join(reasons)}"
        if self.options.kind == "warmstart":
            columns = ", ".join(self.form.first["row"])
            message += f". The columns are: {columns} (--solution-column)"
        raise DatasetError(message)

    def _score(self, scored: list[Scored]) -> None:
        if not scored or self.options.format == "prompts":
            return
        model = self.form.tokens.model
        self.tools.say(f"scoring {len(scored)} rows with {model}")
        values = self.tools.score(model, self.options.trust_remote_code, scored)
        lengths = (len(ids) for _, ids in scored)
        self.exported.scores = list(zip(values, lengths, strict=True))


class _Pace:
    """Says every few seconds how many rows are done, how fast, and how long the rest will take."""

    SECONDS = 5.0

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total = total
        self._say = say
        self._started = time.monotonic()
        self._due = self._started + self.SECONDS

    def show(self, done: int) -> None:
        """`done` of all rows are written."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + self.SECONDS
        rate = done / (now - self._started)
        left = timedelta(seconds=round((self._total - done) / rate))
        self._say(f"{done}/{self._total} rows, {rate:.0f} rows/s, {left} left")


def _drawn_at(runs: list[Run]) -> str:
    """How the student of the records differs from the student at temperature 1."""
    options = [each for run in runs for each in run.stages or [run.compared]]
    temperatures = {each.get("temperature", 1.0) for each in options}
    if temperatures == {1.0}:
        return ""
    return f" (temperature {', '.join(map(str, sorted(temperatures)))})"


def _within_support(runs: list[Run]) -> bool:
    """Whether a run restricted both models to the teacher's likeliest tokens."""
    restricted = ("teacher_support_top_k", -1), ("teacher_support_top_p", 1.0)
    options = [each for run in runs for each in run.stages or [run.compared]]
    return any(each.get(name, off) != off for each in options for name, off in restricted)


def _coverage(options: ExportOptions, runs: list[Run], entries: list[Entry]) -> Coverage:
    alone = student_run(options, runs)
    if alone is None:
        return Coverage.of(entries, None, None)
    found, _ = index([alone])
    return Coverage.of(entries, found, str(alone.path))


def _sections(
    options: ExportOptions,
    runs: list[Run],
    selection: Selection,
    exported: Exported,
    source: Source,
) -> list[Section]:
    left_out = [(reason, str(count)) for reason, count in selection.left_out.items()]
    acceptance = [note for run in runs for note in _acceptance(run.path)]
    return [
        ("The records of the runs", [*source.lines(), *acceptance]),
        ("Left out", left_out or [("nothing", "0")]),
        ("What was exported", list(exported.lines())),
        ("Made with", made_with(runs)),
    ]


def _acceptance(run: Path) -> Iterator[tuple[str, str]]:
    """What the last call on a run says of its drafts."""
    for path in sorted(run.glob("summary*.json")):
        notes = read_json(path).get("notes", {})
        for text in notes.values():
            if "drafted tokens accepted" in str(text):
                yield "drafts (last call)", str(text)


def _more(questions: Questions, tokens: StudentTokens, runs: list[Run]) -> list[Section]:
    ends = {tokens.tokenizer.convert_ids_to_tokens(end): n for end, n in tokens.ends.items()}
    lines = [
        ("model to be trained", tokens.model),
        ("end token of the rows", tokens.end_text),
        ("end tokens drawn", ", ".join(f"{name} {n}" for name, n in ends.items()) or "none"),
        ("run folders", ", ".join(str(run.path) for run in runs)),
    ]
    lines += [
        (f"questions of {name}, checked for overlap", str(count))
        for name, count in questions.counts.items()
    ]
    return [("Tokens and checks", lines)]


def _write_summary(
    folder: Path,
    options: ExportOptions,
    exported: Exported,
    tokens: StudentTokens,
    sections: list[Section],
) -> None:
    """`export.json`: what programs need, and all lines of the card."""
    document: dict[str, Any] = {
        "kind": options.kind,
        "format": options.format,
        "rows": dict(exported.rows),
        "model": tokens.model,
        "vocabulary": vocabulary_hash(tokens.tokenizer.get_vocab()),
        "end_token": tokens.end_text,
        "end_id": tokens.end_id,
        "longest_row": exported.longest,
        "tokens_with_loss": exported.trained_tokens,
        "rows_with_other_ids": exported.changed,
        "some_rows_with_other_ids": exported.changed_rows,
        "student_nll": exported.student_nll,
        "sections": {title: dict(lines) for title, lines in sections},
    }
    text = json.dumps(document, indent=2, ensure_ascii=True) + "\n"
    (folder / "export.json").write_text(text, "utf-8")
