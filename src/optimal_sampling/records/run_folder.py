"""The run folder: `config.json`, `records/<shard>.jsonl`, and the samples that are still owed.

A shard is the part of a run that one data slice makes. It has one file of records, and one process
at a time writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from optimal_sampling.config import ENGINES, GenerateConfig
from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.files import read_json, write_atomically
from optimal_sampling.records.ledger import Ledger
from optimal_sampling.records.schema import SCHEMA_VERSION, Key, Record, key_of
from optimal_sampling.records.store import RecordFile, Scan
from optimal_sampling.version import __version__

__all__ = ["MAY_DIFFER", "RunFolder", "differences", "load", "record_files", "template_date"]

MAY_DIFFER = frozenset(
    {
        "output_dir",  # the folder may have been moved
        "device",  # other rounding, the same distribution; `dtype` is compared
        "trust_remote_code",  # permission, not content
        "num_examples",  # more or fewer of the same prompts
        "data_slice",
        "samples_per_prompt",
        "batch_size",  # speed and memory
        "kv_memory_gib",
        "prefill_chunk",
        "draft_tokens",
        "attention",  # as `device`
        "max_attempts",
    }
)
"""Options that a later call on the same folder may change.

All others change tokens or records; they are compared.
"""


TEMPLATE_DATE = "template_date"
"""The fact that says on which date a run's chat templates print."""


class RunFolder:
    """A run folder, opened to write the shard of a config.

    Opening locks the shard's file, compares the config with that of the folder, reads all records
    and cuts the torn tail of the shard's file. `ledger` then counts all records, `add` appends one.
    `config.json` is written with the first record: a call that fails before leaves the folder free.

    Raises RunFolderError, StorageError.
    """

    def __init__(self, config: GenerateConfig, facts: dict[str, str] | None = None) -> None:
        """`facts`: what else must stay the same, such as a hash of the models' files, by name."""
        self.path = Path(config.run.output_dir)
        self._config = config
        self._facts = facts or {}
        self._has_config = False
        self.ledger = Ledger()
        self.torn_lines = 0
        """Lines cut from the end of the shard's file."""
        self.bad_lines = 0
        """Damaged lines of all files."""
        self.file = RecordFile(self.path / "records" / f"{config.shard}.jsonl")
        try:
            self._has_config = check_config(self.path, config, self._facts)
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
        """Append a record to the shard's file. It is on the disk after the next commit."""
        if not self._has_config:
            write_config(self.path, self._config, self._facts)
            self._has_config = True
        self.file.append(record)
        self.ledger.add(record)

    def close(self) -> None:
        """Commit the waiting records and release the shard's file."""
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


def template_date(run: str | Path) -> date:
    """The date that chat templates print in a run: today, or that of the run's first call.

    Folders that do not say it have the date of their `config.json`. Raises RunFolderError.
    """
    path = Path(run) / "config.json"
    if not path.exists():
        return date.today()
    options = read_json(path).get("compared")
    if isinstance(options, dict) and TEMPLATE_DATE in options:
        return date.fromisoformat(options[TEMPLATE_DATE])
    return date.fromtimestamp(path.stat().st_mtime)


def load(run: str | Path, *, failed: bool = False) -> Iterator[Record]:
    """The good records of a run folder, one per sample, in the order of the files.

    With `failed`, also the last record of each sample that never succeeded.
    Reads the files twice and keeps no record in memory. Raises RunFolderError.
    """
    files = record_files(Path(run))
    if not files:
        raise RunFolderError(f"{run} holds no records (no {Path(run) / 'records'}/*.jsonl)")
    chosen = _latest_attempts(files)
    for path in files:
        for offset, record in Scan(path).with_offsets():
            wanted = failed or not record["error"]
            if wanted and chosen.get(key_of(record)) == (path, offset):
                yield record


def _latest_attempts(files: list[Path]) -> dict[Key, tuple[Path, int]]:
    """File and offset of one record of each sample: a good one before any other."""
    best: dict[Key, tuple[bool, int, Path, int]] = {}
    for path in files:
        for offset, record in Scan(path).with_offsets():
            check_version(record, path)
            key = key_of(record)
            entry = (not record["error"], record["attempts"], path, offset)
            best[key] = max(best.get(key, entry), entry)
    return {key: (path, offset) for key, (*_, path, offset) in best.items()}


def check_version(record: Record, path: Path) -> None:
    """Refuse records of another version of the schema. Raises RunFolderError."""
    version = record["schema_version"]
    if version != SCHEMA_VERSION:
        raise RunFolderError(
            f"{path} holds records of schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version that wrote them, or another --output-dir"
        )


def compared(config: GenerateConfig) -> dict[str, Any]:
    """The options that must be the same at every call on a folder."""
    return {name: value for name, value in flat(config).items() if name not in MAY_DIFFER}


def flat(config: GenerateConfig) -> dict[str, Any]:
    """All options by name, without the sections: names are unique, as flags have to be."""
    options: dict[str, Any] = {"engine": config.engine.name}
    for part in fields(config):
        section = getattr(config, part.name)
        options |= {item.name: getattr(section, item.name) for item in fields(section)}
    return options


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
    """Write `config.json`. Where another process was first, compare with what it wrote."""
    options = compared(config) | facts
    document = {
        "schema_version": SCHEMA_VERSION,
        "package_version": __version__,
        "hash": config_hash(options),
        "compared": options,
        "may_differ": {name: value for name, value in flat(config).items() if name in MAY_DIFFER},
    }
    text = json.dumps(document, indent=2) + "\n"
    if not write_atomically(run / "config.json", text, replace=False):
        check_config(run, config, facts)


def _compare(path: Path, stored: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    before = stored.get("compared")
    if not isinstance(before, dict) or stored.get("hash") != config_hash(before):
        raise RunFolderError(
            f"{path} was changed after it was written; restore it, or choose another --output-dir"
        )
    # Options newer than the folder had their defaults then.
    before = compared(GenerateConfig(engine=ENGINES[options["engine"]]())) | before
    # A fact that only one of the two calls knows is not compared.
    known = {name: value for name, value in options.items() if name in before}
    changed = differences(before, known)
    if not changed:
        return
    lines = [f"  {_flag(name)}: {old!r} there, {new!r} now" for name, old, new in changed]
    raise RunFolderError(
        f"{path.parent} was made with other options:\n"
        + "\n".join(lines)
        + "\nChoose another --output-dir, or give the options of the folder again"
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value before, value now) of every name of `now` that differs."""
    pairs = [(name, before.get(name), value) for name, value in now.items()]
    return [(name, old, new) for name, old, new in pairs if old != new]


def _flag(name: str) -> str:
    if name == TEMPLATE_DATE:
        return "date that chat templates print"
    if name.endswith("_files"):
        return f"content hash of the {name.removesuffix('_files')}'s folder"
    return "--" + name.replace("_", "-")
