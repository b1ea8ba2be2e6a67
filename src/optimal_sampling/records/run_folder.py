"""The run folder: `config.json`, `records/<worker>.jsonl`, and what they say is still owed.

Knows nothing of datasets or engines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from optimal_sampling import __version__
from optimal_sampling.config import ENGINES, GenerateConfig
from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.files import read_json, write_atomically
from optimal_sampling.records.ledger import Ledger
from optimal_sampling.records.schema import SCHEMA_VERSION, Key, Record, key_of
from optimal_sampling.records.store import RecordFile, Scan

__all__ = ["MAY_DIFFER", "RunFolder", "load", "record_files"]

MAY_DIFFER = frozenset(
    {
        "output_dir",  # the folder may have been moved
        "device",  # rounding differs between devices, the distribution does not; `dtype` is compared
        "trust_remote_code",  # permission, not content
        "num_examples",  # more or fewer of the same prompts
        "data_slice",
        "samples_per_prompt",
        "batch_size",  # speed and memory
        "kv_memory_gib",
        "prefill_chunk",
        "draft_tokens",
        "attention",  # as for the device
        "max_attempts",
    }
)
"""Options that a later call on the same folder may change. All others change tokens or records, and are compared."""


class RunFolder:
    """A run folder opened by one worker.

    Opening locks the worker's file, checks the config against the folder's, reads all records, and cuts the torn tail
    of the own file. `ledger` then knows what is good; `add` appends to both. The first record brings `config.json`
    with it: a call that failed before it made anything binds nobody.
    """

    def __init__(self, config: GenerateConfig, facts: dict[str, str] | None = None) -> None:
        """`facts`: what else must not change between calls, such as the content of the models' folders."""
        self.path = Path(config.run.output_dir)
        self._config = config
        self._facts = facts or {}
        self._config_is_there = False
        self.ledger = Ledger()
        self.torn_lines = 0
        self.bad_lines = 0
        self.file = RecordFile(self.path / "records" / f"{config.worker}.jsonl")
        try:
            self._config_is_there = check_config(self.path, config, self._facts)
            self._read()
        except BaseException:
            self.file.close()
            raise

    def _read(self) -> None:
        own = Scan(self.file.path)
        others = [Scan(path) for path in record_files(self.path) if path != own.path]
        for scan in (*others, own):
            for record in scan:
                check_version(record, scan.path)
                self.ledger.add(record)
            self.bad_lines += scan.bad_lines
        self.torn_lines = own.torn_lines
        self.file.open(own)

    def add(self, record: Record) -> None:
        """Append a record."""
        if not self._config_is_there:
            write_config(self.path, self._config, self._facts)
            self._config_is_there = True
        self.file.append(record)
        self.ledger.add(record)

    def close(self) -> None:
        """Commit what waits and release the worker's file."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.file.__exit__(kind, value, tb)


def record_files(run: Path) -> list[Path]:
    """The files of records of a run folder, by name."""
    return sorted((run / "records").glob("*.jsonl"))


def load(run: str | Path, *, failed: bool = False) -> Iterator[Record]:
    """The good records of a run folder, one per sample: the latest attempt, in the order of the files.

    With `failed`, also the last record of each sample that never succeeded. Reads twice, keeps no record.
    """
    files = record_files(Path(run))
    if not files:
        raise RunFolderError(f"{run} holds no records (no {Path(run) / 'records'}/*.jsonl)")
    best: dict[Key, tuple[bool, int, Path, int]] = {}
    for path in files:
        for offset, record in Scan(path).with_offsets():
            check_version(record, path)
            entry = (not record["error"], record["attempts"], path, offset)
            best[key_of(record)] = max(best.get(key_of(record), entry), entry)
    for path in files:
        for offset, record in Scan(path).with_offsets():
            good = not record["error"]
            if (good or failed) and best.get(key_of(record), (None,) * 4)[2:] == (path, offset):
                yield record


def check_version(record: Record, path: Path) -> None:
    """Refuse records whose fields this version may read wrongly."""
    if record["schema_version"] != SCHEMA_VERSION:
        raise RunFolderError(
            f"{path} holds records of schema {record['schema_version']}, this version reads {SCHEMA_VERSION}; "
            "use the version that wrote them, or another --output-dir"
        )


def compared(config: GenerateConfig) -> dict[str, Any]:
    """The options that must be the same at every call on a folder."""
    return {name: value for name, value in flat(config).items() if name not in MAY_DIFFER}


def flat(config: GenerateConfig) -> dict[str, Any]:
    """All options by name, without the sections: names are unique, they are flags too."""
    sections = [getattr(config, item.name) for item in fields(config)]
    return {"engine": config.engine.name} | {
        item.name: getattr(section, item.name) for section in sections for item in fields(section)
    }


def config_hash(options: Mapping[str, Any]) -> str:
    """Content hash of options."""
    return hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_config(run: Path, config: GenerateConfig, facts: dict[str, str]) -> bool:
    """Compare with the folder's `config.json`; False if there is none yet."""
    path = run / "config.json"
    if path.exists():
        _compare(path, read_json(path), compared(config) | facts)
        return True
    if any(file.stat().st_size for file in record_files(run)):
        raise RunFolderError(
            f"{run} has records but no config.json; restore it, or choose another --output-dir"
        )
    return False


def write_config(run: Path, config: GenerateConfig, facts: dict[str, str]) -> None:
    """Write `config.json`. Where another worker was first, compare with what it wrote."""
    options = compared(config) | facts
    document = {
        "schema_version": SCHEMA_VERSION,
        "package_version": __version__,
        "hash": config_hash(options),
        "compared": options,
        "may_differ": {name: value for name, value in flat(config).items() if name in MAY_DIFFER},
    }
    if not write_atomically(
        run / "config.json", json.dumps(document, indent=2) + "\n", replace=False
    ):
        check_config(run, config, facts)


def _compare(path: Path, stored: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    before = stored.get("compared")
    if not isinstance(before, dict) or stored.get("hash") != config_hash(before):
        raise RunFolderError(
            f"{path} was changed after it was written; restore it, or choose another --output-dir"
        )
    # An option that is younger than the folder had its default then; a fact that only one side knows says nothing.
    before = compared(GenerateConfig(engine=ENGINES[options["engine"]]())) | before
    changed = differences(
        before, {name: value for name, value in options.items() if name in before}
    )
    if changed:
        raise RunFolderError(
            f"{path.parent} was made with other options:\n"
            + "\n".join(
                f"  {_flag(name)}: {old!r} there, {new!r} now" for name, old, new in changed
            )
            + "\nChoose another --output-dir, or give the options of the folder again"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value before, value now) of every name of `now` that differs."""
    return [
        (name, before.get(name), value) for name, value in now.items() if before.get(name) != value
    ]


def _flag(name: str) -> str:
    if name.endswith("_files"):
        return f"content hash of the {name.removesuffix('_files')}'s folder"
    return "--" + name.replace("_", "-")
