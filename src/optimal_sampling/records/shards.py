"""Merging run folders that hold the shards of one run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from optimal_sampling.config import parse_slice
from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.files import create_folder, read_json, write_atomically
from optimal_sampling.records.run_folder import differences, load
from optimal_sampling.records.schema import Key, key_of
from optimal_sampling.records.store import RecordFile, Scan

__all__ = ["check_partition", "merge"]


def check_partition(slices: Iterable[str]) -> None:
    """Raise RunFolderError unless the slices are `0::n`, `1::n`, ... `n-1::n`, each once."""
    slices = list(slices)
    n = len(slices)
    parts = sorted((parse_slice(text) for text in slices), key=lambda part: part.start)
    if parts != [slice(start, None, n) for start in range(n)]:
        raise RunFolderError(f"the shards are no partition of the dataset: {', '.join(slices)}")


def merge(shards: Sequence[str | Path], target: str | Path) -> int:
    """Write the good records of finished shards into a new run folder; returns their number.

    `shards` are run folders. All must have the same options, their slices must cover the dataset
    once, and each must hold as many samples as its summary says were asked for. A sample that two
    shards hold is written once: its tokens are the same in both. Raises RunFolderError.
    """
    folders = [Path(shard) for shard in shards]
    target = Path(target)
    if not folders:
        raise RunFolderError("there is no shard to merge")
    if target.exists() and any(target.iterdir()):
        raise RunFolderError(f"{target} is not empty; merge into a new folder")
    document = _common_config(folders)
    create_folder(target / "records")
    write_atomically(target / "config.json", json.dumps(document, indent=2) + "\n")
    kept: set[Key] = set()
    with RecordFile(target / "records" / "main.jsonl") as file:
        file.open(Scan(file.path))
        for folder in folders:
            keys: set[Key] = set()
            for record in load(folder):
                key = key_of(record)
                keys.add(key)
                if key not in kept:
                    file.append(record)
            kept |= keys
            _check_count(folder, len(keys))
    return len(kept)


def _common_config(folders: Sequence[Path]) -> dict[str, Any]:
    documents: list[dict[str, Any]] = [read_json(folder / "config.json") for folder in folders]
    first = documents[0]
    for folder, document in zip(folders[1:], documents[1:], strict=True):
        changed = differences(first["compared"], document["compared"])
        if changed:
            names = ", ".join(f"{name} ({old!r}, {new!r})" for name, old, new in changed)
            raise RunFolderError(
                f"{folders[0]} and {folder} were made with different options: {names}"
            )
    slices = [document["may_differ"]["data_slice"] for document in documents]
    check_partition([part or "0::1" for part in slices])
    return first | {"may_differ": first["may_differ"] | {"data_slice": None}}


def _check_count(folder: Path, good: int) -> None:
    summaries = [read_json(path) for path in sorted(folder.glob("summary*.json"))]
    asked = sum(int(str(summary["asked"])) for summary in summaries)
    if not summaries or good != asked:
        total = asked if summaries else "an unknown number"
        raise RunFolderError(
            f"{folder} has {good} good records of {total} asked for; finish it first"
        )
