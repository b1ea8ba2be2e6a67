"""Run folders and evaluations -> one HTML file that asks nothing of the network.

Text of models is data in the file, compressed and in base64, never markup. The script and the style
are ours and are named by their hashes in the Content-Security-Policy, so nothing else can run.
"""

from __future__ import annotations

import gzip
import html
import json
import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from optimal_sampling.config import expand_user
from optimal_sampling.records.store import write_atomically
from optimal_sampling.report.folders import Evaluation, RunSource, open_folders
from optimal_sampling.report.options import ReportOptions
from optimal_sampling.report.overview import RunOverview
from optimal_sampling.report.samples import metrics_data, sample_entry, sample_text, sample_top
from optimal_sampling.report.selection import Selection
from optimal_sampling.spans import run_reader, spanned_text
from optimal_sampling.version import __version__

__all__ = ["Page", "write_report"]

_CHUNK = 20  # samples that are decompressed together
_SCRIPTS = ("core", "runs", "charts", "tokens", "card", "samples", "main")
_LEVEL = 6  # of gzip


@dataclass
class Page:
    """What is written into the file."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    samples: list[list[Any]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    tops: list[Any] = field(default_factory=list)
    evaluations: Sequence[Evaluation] = ()
    path: Path = Path("report.html")

    def add_run(self, run: RunSource, most: int, top: int) -> None:
        """Read a run once, and keep its counts and the samples that are shown."""
        overview, selection = RunOverview(), Selection(most)
        for record, graded in run.records():
            overview.add(record, graded)
            selection.add(record, graded)
        reader, problem = run_reader(run.options)
        place, chosen = len(self.runs), selection.samples()
        for record, graded in chosen:
            text = spanned_text(record, reader, problem)
            self.samples.append(sample_entry(place, record, graded))
            self.texts.append(sample_text(record, text, graded))
            self.tops.append(sample_top(record, text, reader, top))
        self.runs.append(
            {
                "name": run.name,
                "path": str(run.path),
                "options": _options(run.options),
                "notes": [
                    *run.notes,
                    *([f"Tokens are not coloured: {problem}."] if problem else []),
                ],
                "shown": len(chosen),
                **overview.data(run),
            }
        )

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
            "samples": self.samples,
            "chunk": _CHUNK,
        }
        yield _block("index", index)
        for number, start in enumerate(range(0, len(self.samples), _CHUNK)):
            part = slice(start, start + _CHUNK)
            yield _block(f"texts-{number}", self.texts[part])
            if any(self.tops[part]):
                yield _block(f"tops-{number}", self.tops[part])


def write_report(options: ReportOptions) -> Page:
    """Write the page. Raises ConfigError, RunFolderError, StorageError."""
    runs, evaluations = open_folders(options.runs)
    page = Page(evaluations=evaluations, path=expand_user(options.output))
    for run in runs:
        page.add_run(run, options.samples, options.top)
    write_atomically(page.path, page.html())
    return page


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
    """Data that a browser does not run, and in which no markup can be."""
    data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packed = b64encode(gzip.compress(data.encode(), _LEVEL, mtime=0)).decode()
    return f'<script type="application/octet-stream" id="{name}">{packed}</script>'


def _script() -> str:
    """The parts in one scope, without a build step."""
    parts = (_asset(f"{name}.js").removeprefix('"use strict";') for name in _SCRIPTS)
    return '"use strict";' + "\n".join(parts)


def _asset(name: str) -> str:
    return (files(__package__) / "assets" / name).read_text("utf-8").strip()


def _hash(text: str) -> str:
    return b64encode(sha256(text.encode()).digest()).decode()
