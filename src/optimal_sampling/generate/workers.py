"""The workers of a run: their rows in a display, and the file by which `status` knows them.

`workers.json` is there while a run with workers goes; `workers-<shard>.json` of a data slice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.store import write_atomically
from optimal_sampling.types import WorkerStatus

__all__ = ["NO_WORKERS", "WorkersFile", "status_lines", "worker_table", "worker_text"]

_SECONDS_BETWEEN_WRITES = 5.0
_STALE = 60.0  # seconds after which the run is taken to have ended


class WorkersFile:
    """Rows on the disk, written every few seconds while they are updated. A context manager."""

    def __init__(self, run: Path, shard: str, seconds: float = _SECONDS_BETWEEN_WRITES) -> None:
        self.path = run / ("workers.json" if shard == "main" else f"workers-{shard}.json")
        self._seconds = seconds
        self._due = 0.0

    def update(self, rows: Sequence[WorkerStatus]) -> None:
        """Write the rows if that is due. Nothing where there are none."""
        if not rows or time.monotonic() < self._due:
            return
        document = {"time": time.time(), "workers": [asdict(row) for row in rows]}
        write_atomically(self.path, json.dumps(document) + "\n")
        self._due = time.monotonic() + self._seconds

    def __enter__(self) -> WorkersFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.path.unlink(missing_ok=True)


def status_lines(run: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each worker of the runs that go in a folder. Raises RunFolderError."""
    for path in sorted(run.glob("workers*.json")):
        for row in _rows(path):
            yield row.name, worker_text(row)


def _rows(path: Path) -> Sequence[WorkerStatus]:
    """Those of a run that goes; none where it has ended. Raises RunFolderError."""
    try:
        document = json.loads(path.read_text("utf-8"))
        if time.time() - document["time"] > _STALE:
            return ()
        return [WorkerStatus(**row) for row in document["workers"]]
    except FileNotFoundError:  # the run has ended this moment
        return ()
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} holds no rows of workers; remove it") from error


def worker_text(row: WorkerStatus) -> str:
    """What a worker does, in a line."""
    parts = [row.device, row.state, f"{row.in_flight} in flight"]
    parts.append(f"{row.tokens_per_second:.0f} tokens/s")
    if row.failures:
        parts.append(f"{row.failures} failures")
    return ", ".join(parts)


def worker_table(rows: Sequence[WorkerStatus]) -> Table:
    """A row per worker, for a terminal."""
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(Text(row.name), Text(worker_text(row)))
    return table


NO_WORKERS: Callable[[], Sequence[WorkerStatus]] = tuple
"""Of a run in one process."""
