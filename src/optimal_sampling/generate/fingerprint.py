"""What may change between two calls on one run: the models' files, and the rows of the dataset."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from optimal_sampling.config import GenerateConfig, ModelConfig
from optimal_sampling.errors import DatasetError
from optimal_sampling.generate.dataset import Dataset
from optimal_sampling.records.run_folder import RunFolder, load
from optimal_sampling.records.schema import jsonable, row_id
from optimal_sampling.vocabulary import resolve_model

__all__ = ["check_rows", "engine_facts", "fingerprint", "model_facts"]

_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model")
# Training changes weights everywhere, so that samples of a file are enough.
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 8
_COMPARED_ROWS = 100  # most rows that are compared by column


def model_facts(models: ModelConfig, *, elsewhere: bool = False) -> dict[str, str]:
    """The precision of the weights, and a hash of the files of each model that is a folder.

    The content of a hub id is taken as fixed. `elsewhere`: models are loaded on other machines, so
    that a GPU that was asked for need not be here.
    """
    import torch

    from optimal_sampling.engines.device import resolve_device, resolve_dtype

    is_remote = elsewhere and models.device == "cuda"
    device = torch.device("cuda") if is_remote else resolve_device(models.device)
    dtype = resolve_dtype(models.dtype, device)
    facts = {"precision": str(dtype).removeprefix("torch.")}
    for role, name in (("student", models.student), ("teacher", models.teacher)):
        folder = Path(resolve_model(name))
        if folder.is_dir():
            facts[f"{role}_files"] = fingerprint(folder)
    return facts


def engine_facts(config: GenerateConfig) -> dict[str, str]:
    """What the engine's surroundings must not change, such as the models that servers have.

    Raises ConfigError, EngineError.
    """
    if not config.engine.facts_function:
        return {}
    module, name = config.engine.facts_function.split(":")
    mode = "mixture" if config.stages else config.run.mode
    facts: dict[str, str] = getattr(import_module(module), name)(config.engine, mode)
    return facts


def fingerprint(folder: Path) -> str:
    """Hash of a model's files: their names, their sizes, and samples of their content."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix not in _SUFFIXES or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\x00{size}\x00".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            for place in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * place // (_SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def check_rows(dataset: Dataset, folder: RunFolder) -> None:
    """Raise DatasetError where a row that good records were made of is gone or has changed.

    Rows that follow them are new, and rows without a good record may be corrected.
    """
    rows = folder.ledger.rows
    last = max(rows, default=-1)
    changed: dict[int, dict[str, Any]] = {}
    for index, row in dataset if rows else ():
        if index > last or len(changed) == _COMPARED_ROWS:
            break
        if rows.get(index, "") not in ("", row_id(row)):
            changed[index] = row
    found: dict[int, str] = {}
    for record in load(folder.path) if changed else ():
        row = changed.get(record["row_index"], record["row"])
        columns = [name for name in record["row"] | row if _differ(record["row"], row, name)]
        if columns:
            found[record["row_index"]] = ", ".join(columns)
    if found:
        first = min(found)
        raise DatasetError(
            f"row {first} of dataset {dataset.source.name} has changed since {folder.path} was "
            f"begun, in: {found[first]} ({len(found)} such rows found); {_REMEDY}"
        )
    if dataset.is_whole and last >= dataset.total:
        raise DatasetError(
            f"dataset {dataset.source.name} has {dataset.total} rows, and {folder.path} has "
            f"records of row {last}; {_REMEDY}"
        )


_REMEDY = "restore it, or choose another --output-dir"


def _differ(recorded: Mapping[str, Any], row: Mapping[str, Any], column: str) -> bool:
    """Whether a column has changed. Version 0.1.0 recorded bytes in another way: not compared."""
    before, now = (
        json.dumps([jsonable(each[column])] if column in each else [], sort_keys=True)
        for each in (recorded, row)
    )
    mark = " bytes, blake2b "
    return before != now and (mark in before or mark not in now)
