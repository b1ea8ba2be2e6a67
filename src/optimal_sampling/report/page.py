"""Run folders and evaluations -> one HTML file that asks nothing of the network.

Text of models is data in the file, compressed and in base64, never markup. The script and the style
are ours and are named by their hashes in the Content-Security-Policy, so nothing else can run.
"""

from __future__ import annotations

import gzip
import html
import json
import re
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from optimal_sampling.config import expand_user
from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.schema import Record
from optimal_sampling.records.store import write_atomically
from optimal_sampling.records.verdicts import Graded
from optimal_sampling.report.folders import Evaluation, RunSource, open_folders
from optimal_sampling.report.options import ReportOptions
from optimal_sampling.report.overview import RunOverview
from optimal_sampling.report.samples import metrics_data, sample_entry, sample_text, sample_top
from optimal_sampling.report.selection import Selection
from optimal_sampling.spans import run_reader, spanned_text
from optimal_sampling.version import __version__

__all__ = ["Page", "write_report"]

_CHUNK = 20  # samples that are decompressed together
_SCRIPTS = (
    "core",
    "runs",
    "scores",
    "shapes",
    "charts",
    "tokens",
    "card",
    "search",
    "sample",
    "samples",
    "main",
)
_SECONDS_BETWEEN_LINES = 5.0
_LEVEL = 6  # of gzip


Say = Callable[[str], None]


def _silent(line: str) -> None:
    """Say nothing."""


@dataclass
class Page:
    """What is written into the file."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    samples: list[list[Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    tops: list[Any] = field(default_factory=list)
    evaluations: Sequence[Evaluation] = ()
    path: Path = Path("report.html")
    unreadable: list[RunFolderError] = field(default_factory=list)
    """Of the runs without any record that could be read."""

    def add_run(self, run: RunSource, options: ReportOptions, say: Say = _silent) -> None:
        """Read a run once, and keep its counts and the samples that are shown.

        A run that cannot be read, such as one of another schema, is on the page with the reason.
        """
        overview, selection, notes = RunOverview(), Selection(options.samples), [*run.notes]
        try:
            for record, graded in _counted(run, say):
                overview.add(record, graded)
                selection.add(record, graded)
        except RunFolderError as error:
            self.unreadable.append(error)
            notes.append(f"Its records cannot be read: {error}")
        notes += self._add_samples(run, selection.samples(), options.top)
        self.runs.append(
            {
                "name": run.name,
                "path": str(run.path),
                "options": _options(run.options),
                "notes": notes,
                "shown": len(selection.samples()),
                **overview.data(run),
            }
        )

    def _add_samples(
        self, run: RunSource, chosen: Sequence[tuple[Record, Graded | None]], top: int
    ) -> Iterator[str]:
        """Keep what is shown of samples; why they have no colours, where they have none."""
        reader, problem = run_reader(run.options)
        for record, graded in chosen:
            text = spanned_text(record, reader, problem)
            self.samples.append(sample_entry(len(self.runs), record, graded))
            self.texts.append(sample_text(record, text, graded))
            self.tops.append(sample_top(record, text, reader, top))
        shown = self.texts[len(self.texts) - len(chosen) :]
        if problem and any(text["unit"] == "none" for text in shown):
            yield f"Tokens are not coloured: {problem}."

    def lines(self) -> Iterator[str]:
        """What was written, for the command line."""
        for run in self.runs:
            total = run["good"] + run["failed"]
            shown = "all" if run["shown"] == total else f"{run['shown']}"
            yield f"{run['name']}: {shown} of {total} samples"
            yield from (f"  {note}" for note in run["notes"])
        yield f"{self.path} ({self.path.stat().st_size / 1024:.0f} KiB)"

    def html(self) -> str:
        """The file."""
        style, script = _asset("report.css"), _script()
        policy = (
            f"default-src 'none'; script-src 'sha256-{_hash(script)}'; "
            f"style-src 'sha256-{_hash(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
        )
        title = ", ".join([run["name"] for run in self.runs] + [e.name for e in self.evaluations])
        parts = {
            "policy": policy,
            "title": html.escape(title),
            "style": style,
            "script": script,
            "data": "\n".join(self._blocks()),
        }
        return re.sub(r"\[\[(\w+)\]\]", lambda match: parts[match[1]], _asset("report.html"))

    def _blocks(self) -> Iterator[str]:
        index = {
            "version": __version__,
            "runs": self.runs,
            "differences": _differences([run["options"] for run in self.runs]),
            "evaluations": [{"name": e.name, **e.summary} for e in self.evaluations],
            "metrics": metrics_data(),
            "columns": sorted({name for text in self.texts for name in text["columns"]}),
            "samples": self.samples,
            "chunk": _CHUNK,
        }
        yield _block("index", index)
        for number, start in enumerate(range(0, len(self.samples), _CHUNK)):
            part = slice(start, start + _CHUNK)
            yield _block(f"texts-{number}", self.texts[part])
            if any(self.tops[part]):
                yield _block(f"tops-{number}", self.tops[part])


def write_report(options: ReportOptions, say: Say = _silent) -> Page:
    """Write the page. Raises ConfigError, StorageError, and RunFolderError where no run can be
    read.
    """
    runs, evaluations = open_folders(options.runs)
    page = Page(evaluations=evaluations, path=expand_user(options.output))
    for run in runs:
        page.add_run(run, options, say)
    if page.unreadable and len(page.unreadable) == len(runs) and not evaluations:
        raise page.unreadable[0]
    write_atomically(page.path, page.html())
    return page


def _counted(run: RunSource, say: Say) -> Iterator[tuple[Record, Graded | None]]:
    """The records of a run; says every few seconds how many there were."""
    started = told = time.monotonic()
    for count, each in enumerate(run.records(), start=1):
        yield each
        now = time.monotonic()
        if now - told > _SECONDS_BETWEEN_LINES:
            told = now
            say(f"{run.name}: {count} records read, {count / (now - started):.0f} a second")


def _options(options: Any) -> dict[str, Any]:
    """Without hashes of files; stages have a table of their own."""
    return {
        name: value
        for name, value in options.items()
        if name != "stages" and not name.endswith("_files")
    }


def _differences(options: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the options that not all runs share."""
    known = [each for each in options if each]
    names = dict.fromkeys(name for each in known for name in each)
    return [name for name in names if len({str(each.get(name)) for each in known}) > 1]


def _block(name: str, value: Any) -> str:
    """Data that a browser does not run, and in which no markup can be. Characters that UTF-8 does
    not have become U+FFFD.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        data = text.encode()
    except UnicodeEncodeError:  # a lone surrogate has no UTF-8
        data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    packed = b64encode(gzip.compress(data, _LEVEL, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="{name}">{packed}</script>'


def _script() -> str:
    """The parts in one scope, without a build step."""
    parts = (_asset(f"{name}.js").removeprefix('"use strict";') for name in _SCRIPTS)
    return '"use strict";' + "\n".join(parts)


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text("utf-8").strip()


def _hash(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()
