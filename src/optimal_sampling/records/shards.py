"""Merging run folders that hold the shards of one run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from optimal_sampling.config import expand_user, parse_slice
from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.run_folder import differences, load
from optimal_sampling.records.schema import Key, key_of
from optimal_sampling.records.store import RecordFile, Scan, read_json, write_atomically
from optimal_sampling.records.verdicts import VerdictFile, graded_records

__all__ = ["check_partition", "end_of_shards", "merge"]


def check_partition(slices: Sequence[str]) -> None:
    """Raise RunFolderError unless the slices together hold each row once.

    The rows are those up to the largest STOP, or all where a slice has no STOP.
    """
    parts = [parse_slice(text) for text in slices]
    period = math.lcm(*(part.step for part in parts))
    held = [range(part.start, _stop(part), part.step) for part in parts]
    ends = sorted({0, *(rows.start for rows in held), *(rows.stop for rows in held)})
    # Between two ends the same slices go on, so that one period shows all that follows.
    for low, high in pairwise(ends):
        for row in range(low, min(high, low + period)):
            count = sum(row in rows for rows in held)
            if count != 1:
                raise RunFolderError(
                    f"the shards are no partition of the dataset: row {row} is in {count} of the "
                    f"slices {', '.join(slices)}"
                )


def _stop(part: slice) -> int:
    return sys.maxsize if part.stop is None else part.stop


def end_of_shards(shards: Sequence[str | Path]) -> int | None:
    """The row before which the slices of run folders end; None where they go on to the last."""
    options = [read_json(expand_user(shard) / "config.json")["may_differ"] for shard in shards]
    stops = [parse_slice(each["data_slice"] or "0:").stop for each in options]
    end = max(sys.maxsize if stop is None else stop for stop in stops)
    rows = options[0]["num_examples"] or sys.maxsize
    return None if end >= rows else int(end)


def merge(shards: Sequence[str | Path], target: str | Path) -> int:
    """Write the good records of finished shards into a new run folder; returns their number.

    `shards` are run folders. All must have the same options, their slices must hold each row once
    (`0::2` and `1::2`, or `0:20` and `20:40`), and each must hold as many samples as its summary
    says were asked for. A sample that two shards hold is written once: its tokens are the same in
    both. Verdicts go with their records. Raises RunFolderError.
    """
    folders = [expand_user(shard) for shard in shards]
    target = expand_user(target)
    if not folders:
        raise RunFolderError("there is no shard to merge")
    if target.is_file() or (target.exists() and any(target.iterdir())):
        raise RunFolderError(f"{target} is not empty; merge into a new folder")
    document = _common_config(folders)
    for folder in folders:  # before anything is written
        _check_count(folder, sum(1 for _ in load(folder)))
    write_atomically(target / "config.json", json.dumps(document, indent=2) + "\n")
    path = target / "records" / "main.jsonl"
    count = _write_records(folders, path)
    _write_summary(target, path, count)
    return count


def _write_records(folders: Sequence[Path], path: Path) -> int:
    """Write the records of the shards into a new file, and their verdicts; their number."""
    kept: set[Key] = set()
    with RecordFile(path) as file, ExitStack() as opened:
        file.open(Scan(path))
        verdicts: VerdictFile | None = None
        for folder in folders:
            for record, graded in graded_records(folder):
                if key_of(record) in kept:
                    continue
                kept.add(key_of(record))
                checksum = file.append(record)
                if graded is not None:
                    verdicts = verdicts or opened.enter_context(
                        VerdictFile(path.parents[1], path.stem)
                    )
                    verdicts.append({**graded, "record": checksum})
    return len(kept)


def _write_summary(target: Path, records_file: Path, count: int) -> None:
    """Write the counts of a complete run. It has no speed: no token was made."""
    summary = {
        "status": "complete",
        "run_folder": str(target),
        "records_file": str(records_file),
        "asked": count,
        "good": count,
        "owed": 0,
    }
    write_atomically(target / "summary.json", json.dumps(summary, indent=2) + "\n")


def _common_config(folders: Sequence[Path]) -> dict[str, Any]:
    documents = [read_json(folder / "config.json") for folder in folders]
    first, *others = ({**document["compared"], **_amounts(document)} for document in documents)
    for folder, other in zip(folders[1:], others, strict=True):
        changed = differences(first, other, "{name} ({before!r}, {now!r})")
        if changed:
            raise RunFolderError(
                f"{folders[0]} and {folder} were made with different options: {', '.join(changed)}"
            )
    check_partition([document["may_differ"]["data_slice"] or "0::1" for document in documents])
    return documents[0] | {"may_differ": documents[0]["may_differ"] | {"data_slice": None}}


def _amounts(document: dict[str, Any]) -> dict[str, Any]:
    """Options that a folder may change, and that shards of one run share."""
    return {name: document["may_differ"][name] for name in ("num_examples", "samples_per_prompt")}


def _check_count(folder: Path, good: int) -> None:
    summaries = [read_json(path) for path in folder.glob("summary*.json")]
    if any(summary.get("status") == "interrupted" for summary in summaries):
        raise RunFolderError(f"the last call on {folder} was interrupted; finish it first")
    asked = sum(summary["asked"] for summary in summaries) if summaries else "an unknown number"
    if good != asked:
        raise RunFolderError(
            f"{folder} has {good} good records of {asked} asked for; finish it first"
        )
