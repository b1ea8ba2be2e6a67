"""The run folder: `config.json`, `records/<shard>.jsonl`, and the samples that are still owed.

A shard is the part of a run that one data slice makes. It has one file of records, and one process
at a time writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

from optimal_sampling.config import ENGINES, Checked, GenerateConfig, Stage, expand_user
from optimal_sampling.errors import RunFolderError
from optimal_sampling.records.schema import FIELDS, SCHEMA_VERSION, Key, Record, key_of, row_id
from optimal_sampling.records.store import Line, RecordFile, Scan, read_json, write_atomically
from optimal_sampling.version import __version__

__all__ = [
    "GRADED_BY",
    "MAY_DIFFER",
    "MEANS",
    "TEMPLATE_DATE",
    "Ledger",
    "Records",
    "RunFolder",
    "Totals",
    "differences",
    "flat",
    "load",
    "record_lines",
    "stage_options",
    "stage_text",
    "template_date",
]

MAY_DIFFER = frozenset(
    {
        "output_dir",  # the folder may have been moved
        "device",  # other rounding, the same distribution; `dtype` is compared
        "allow_unused_weights",  # permission, not content
        "trust_remote_code",
        "num_examples",  # more or fewer of the same prompts
        "data_slice",
        "samples_per_prompt",
        "batch_size",  # speed and memory
        "kv_memory_gib",
        "prefill_chunk",
        "draft_tokens",
        "gpu_memory_utilization",
        "tensor_parallel_size",
        "attention",  # as `device`
        "fused_layers",
        "check_models",  # a check at the start
        "max_attempts",
        "verify",  # verdicts say themselves what they are about
        "reference",
        "verify_workers",
        "verify_timeout",
        "workers",  # who does the work
        "ray",
        "gpus_per_worker",
        "worker_timeout",
        "teacher_url",  # the served models are compared, not where they are
        "student_url",
        "teacher_api_key_env",
        "student_api_key_env",
        "teacher_api_key_file",
        "student_api_key_file",
        "server_timeout",
        "server_retry_seconds",
    }
)
"""Options that a later call on the same folder may change.

All others change tokens or records; they are compared.
"""


_SHOWN_IN_NOTEBOOKS = 10

TEMPLATE_DATE = "template_date"
"""The fact that says on which date a run's chat templates print."""

GRADED_BY = "graded_by"
"""The fact that says how the completions of a run of stages are graded."""

MEANS = tuple(name for name, field in FIELDS.items() if field.is_mean)
"""Fields of a record of which a folder has the mean: over all tokens, or over completions."""

LARGEST = tuple(name for name, field in FIELDS.items() if field.is_largest)
"""Fields of a record of which a folder has the largest."""


_ConfigState = Literal["none", "same", "extended"]
"""Of the `config.json` of a folder: there is none, it has the options of this call, or the options
of this call have more stages."""


@dataclass
class Totals:
    """Sums over good records."""

    records: int = 0
    tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    largest: dict[str, float] = field(default_factory=dict)
    """Of LARGEST, those that a record has."""
    _sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))
    _weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEANS, 0.0))

    def add(self, record: Record) -> None:
        """Count one good record."""
        tokens = record["n_completion_tokens"]
        self.records += 1
        self.tokens += tokens
        self.finish_reasons[record["finish_reason"]] += 1
        for name in LARGEST:
            value = record.get(name)
            if isinstance(value, float):
                self.largest[name] = max(value, self.largest.get(name, value))
        is_one_model_of_several = "stage" in record and record["mode"] != "mixture"
        for name in MEANS:
            if name == "alpha_mean" and is_one_model_of_several:
                continue  # 0 or 1 by definition
            mean = record.get(name)
            weight = record.get(FIELDS[name].weight, 1.0)
            count = 1 if FIELDS[name].per_completion else tokens
            if isinstance(mean, float) and isinstance(weight, float):
                self._sums[name] += mean * weight * count
                self._weights[name] += weight * count

    def mean(self, name: str) -> float | None:
        """Mean of one of MEANS over all tokens; None where there are no tokens."""
        weight = self._weights[name]
        return self._sums[name] / weight if weight else None

    def means(self) -> dict[str, float | None]:
        """Every mean, each of LARGEST, and `ess_ratio`: the ratio of the two mean effective sample
        sizes.

        (A mean of per-token ratios would be that of a few tokens with tiny denominators.)
        """
        means = {name: self.mean(name) for name in MEANS}
        student, teacher = means["ess_student"], means["ess_teacher"]
        ratio = teacher / student if student and teacher is not None else None
        return means | self.largest | {"ess_ratio": ratio}


@dataclass
class Ledger:
    """The samples of a run folder. Owed = asked for, less the good ones."""

    good: dict[Key, int] = field(default_factory=dict)
    """Index in the dataset of the row that each good sample was made of."""
    failed: dict[Key, int] = field(default_factory=dict)
    """Attempts at each sample that is not good yet."""
    rows: dict[int, str] = field(default_factory=dict)
    """`row_id` of each row that good records were made of, by its index in the dataset."""
    totals: Totals = field(default_factory=Totals)

    def add(self, record: Record) -> None:
        """Count a record. After a good one, later records of its sample change nothing."""
        key = key_of(record)
        if key in self.good:
            return
        if record["error"]:
            self.failed[key] = max(record["attempts"], self.attempts(key))
            return
        self.failed.pop(key, None)
        self.good[key] = record["row_index"]
        self.rows[record["row_index"]] = row_id(record["row"])
        self.totals.add(record)

    def attempts(self, key: Key) -> int:
        """Failed attempts at a sample that is not good."""
        return self.failed.get(key, 0)

    def owes(self, key: Key, max_attempts: int) -> bool:
        """Whether the sample is neither good nor has failed `max_attempts` times."""
        return key not in self.good and self.attempts(key) < max_attempts


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
        self._options = flat(config) | (facts or {})
        self.ledger = Ledger()
        self.torn_lines = 0
        """Lines cut from the end of the shard's file."""
        self.bad_lines = 0
        """Damaged lines of all files."""
        self.file = RecordFile(self.path / "records" / f"{config.shard}.jsonl")
        try:
            self._config = _check_config(self.path, self._options)
            self._read()
        except BaseException:
            self.file.close()
            raise

    def _read(self) -> None:
        own = Scan(self.file.path)
        others = [Scan(path) for path in _record_files(self.path) if path != own.path]
        for scan in (*others, own):
            for record in scan:
                _check_version(record, scan.path)
                self.ledger.add(record)
            self.bad_lines += scan.bad_lines
        self.torn_lines = own.torn_lines
        self.file.open(own)

    def add(self, record: Record) -> str:
        """Append a record to the shard's file; its checksum.

        It is on the disk after the next commit.
        """
        if self._config != "same":
            _write_config(self.path, self._options, replace=self._config == "extended")
            self._config = "same"
        checksum = self.file.append(record)
        self.ledger.add(record)
        return checksum

    def close(self) -> None:
        """Commit the waiting records and release the shard's file."""
        self.file.close()

    def recount(self) -> None:
        """Count the records on the disk again.

        An interrupt may have come between the write of a record and its count.
        """
        self.ledger = Ledger()
        for path in _record_files(self.path):
            for record in Scan(path):
                self.ledger.add(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _record_files(run: Path) -> list[Path]:
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


class Records(Iterator[Record]):
    """The records that `load` yields. A notebook shows the first of them as coloured text."""

    def __init__(self, run: str | Path, *, failed: bool = False) -> None:
        self.run = expand_user(run)
        self._failed = failed
        self._lines = record_lines(run, failed=failed)

    def __next__(self) -> Record:
        _, line = next(self._lines)
        return line.record

    def _repr_html_(self) -> str:
        from optimal_sampling.spans import page_html, run_reader, spanned_text

        try:
            reader, problem = run_reader(_options_of(self.run))
            lines = islice(record_lines(self.run, failed=self._failed), _SHOWN_IN_NOTEBOOKS)
            records = [line.record for _, line in lines]
        except RunFolderError as error:
            return page_html(str(error), [])
        samples = [(_title(each), spanned_text(each, reader, problem)) for each in records]
        return page_html(f"the first {len(samples)} records of {self.run}", samples)


def _options_of(run: Path) -> dict[str, Any]:
    """What all calls on a folder share; empty where its config cannot be read."""
    try:
        options = read_json(run / "config.json").get("compared")
    except RunFolderError:
        return {}
    return options if isinstance(options, dict) else {}


def _title(record: Record) -> str:
    """What tells a record from others."""
    failure = f", failed: {record['error']}" if record["error"] else ""
    return f"row {record['row_index']}, sample {record['sample_index']}{failure}"


def load(run: str | Path, *, failed: bool = False) -> Records:
    """The good records of a run folder, one per sample, in the order of the files.

    With `failed`, also the last record of each sample that never succeeded.
    Reads the files twice and keeps no record in memory. Raises RunFolderError.
    """
    return Records(run, failed=failed)


def record_lines(run: str | Path, *, failed: bool = False) -> Iterator[tuple[str, Line]]:
    """What `load` yields, as lines, each with the name of its shard."""
    folder = expand_user(run)
    files = _record_files(folder)
    if not files:
        raise RunFolderError(f"{run} holds no records (no {folder / 'records'}/*.jsonl)")
    best: dict[Key, tuple[bool, int, Path, int]] = {}
    for path in files:
        for start, _, record in Scan(path).lines():
            _check_version(record, path)
            attempt = (not record["error"], record["attempts"], path, start)
            key = key_of(record)
            best[key] = max(best.get(key, attempt), attempt)
    chosen = {(path, start) for good, _, path, start in best.values() if good or failed}
    for path in files:
        for line in Scan(path).lines():
            if (path, line.start) in chosen:
                yield path.stem, line


def _check_version(record: Record, path: Path) -> None:
    version = record["schema_version"]
    if version != SCHEMA_VERSION:
        raise RunFolderError(
            f"{path} holds records of schema {version}, this version reads {SCHEMA_VERSION}; "
            "use the version that wrote them, or another --output-dir"
        )


def flat(config: GenerateConfig) -> dict[str, Any]:
    """All options by name, without the sections: names are unique, as flags have to be."""
    options: dict[str, Any] = {"engine": config.engine.name}
    for section in vars(config).values():
        options |= vars(section) if isinstance(section, Checked) else {}
    options["stages"] = [stage_options(stage) for stage in config.stages]
    lists = {name: list(value) for name, value in options.items() if isinstance(value, tuple)}
    return options | lists  # as JSON has them


def stage_options(stage: Stage) -> dict[str, Any]:
    """The options of a stage by name."""
    own = {name: value for name, value in vars(stage).items() if name != "mixture"}
    return own | vars(stage.mixture)


def stage_text(options: Mapping[str, Any]) -> str:
    """A stage in words, from its `stage_options`."""
    default = stage_options(Stage(options["name"]))
    mode, tries = options["mode"], options["tries"]
    others = [
        f"{name} {value}"
        for name, value in options.items()
        if name not in ("mode", "tries") and value != default.get(name)
    ]
    drawn = "the mixture" if mode == "mixture" else f"the {mode} alone"
    return ", ".join([drawn, f"{tries} {'try' if tries == 1 else 'tries'}", *others])


def compared(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and facts, that must be the same at every call on a folder."""
    return {name: value for name, value in options.items() if name not in MAY_DIFFER}


def config_hash(options: Mapping[str, Any]) -> str:
    """Content hash of options."""
    return hashlib.blake2b(json.dumps(options, sort_keys=True).encode(), digest_size=16).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any], form: str) -> list[str]:
    """Each name of both whose values differ, as `form` writes `name`, `before` and `now`."""
    before, now = _without_lists(before), _without_lists(now)
    return [
        form.format(name=_flag(name), before=before[name], now=value)
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def _without_lists(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and those of each stage under names of their own."""
    stages = options.get("stages", [])
    spread = {name: value for name, value in options.items() if name != "stages"}
    for number, stage in enumerate(_whole(stages), start=1):
        spread |= {f"stage {number}, {name}": value for name, value in stage.items()}
    return spread | {"number of stages": len(stages)}


def _whole(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages, with the options that are newer than their folder."""
    return [stage_options(Stage(stage["name"])) | stage for stage in stages]


def _extends(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> bool:
    """Whether stages only go on where others ended: more tries of the last one, or more stages.

    Every record that was made is then one that a run of the new stages makes too.
    """
    if not before or now == before or len(now) < len(before):
        return False
    *same, last = before
    grown = now[len(same)]
    has_more = grown["tries"] >= last["tries"]
    return now[: len(same)] == same and has_more and {**grown, "tries": last["tries"]} == last


def _flag(name: str) -> str:
    if name == TEMPLATE_DATE:
        return "date that chat templates print"
    if name == GRADED_BY:
        return "grader and reference answer"
    if name.startswith(("stage ", "number ")):
        return name
    if name.endswith("_served"):
        return f"model of the {name.removesuffix('_served')}'s server"
    if name.endswith("_files"):
        return f"content hash of the {name.removesuffix('_files')}'s folder"
    return "--" + name.replace("_", "-")


def _check_config(run: Path, options: Mapping[str, Any]) -> _ConfigState:
    """Compare with the folder's `config.json`."""
    path = run / "config.json"
    if not path.exists():
        if any(file.stat().st_size for file in _record_files(run)):
            raise RunFolderError(
                f"{run} has records but no config.json; restore it, or choose another --output-dir"
            )
        return "none"
    stored = read_json(path)
    before = stored.get("compared")
    if not isinstance(before, dict) or stored.get("hash") != config_hash(before):
        raise RunFolderError(
            f"{path} was changed after it was written; restore it, or choose another --output-dir"
        )
    # Options newer than the folder had their defaults then.
    before = flat(GenerateConfig(engine=ENGINES[options["engine"]]())) | before
    extended = _extends(_whole(before["stages"]), options["stages"])
    before |= {"stages": options["stages"]} if extended else {}
    changed = differences(before, compared(options), "  {name}: {before!r} there, {now!r} now")
    if changed:
        raise RunFolderError(
            f"{run} was made with other options:\n"
            + "\n".join(changed)
            + "\nChoose another --output-dir, or give the options of the folder again"
        )
    return "extended" if extended else "same"


def _write_config(run: Path, options: Mapping[str, Any], *, replace: bool) -> None:
    """Write `config.json`. Without `replace`, compare with what another process has written."""
    same = compared(options)
    document = {
        "schema_version": SCHEMA_VERSION,
        "package_version": __version__,
        "hash": config_hash(same),
        "compared": same,
        "may_differ": {name: options[name] for name in options if name in MAY_DIFFER},
    }
    text = json.dumps(document, indent=2) + "\n"
    if not write_atomically(run / "config.json", text, replace=replace):
        _check_config(run, options)
