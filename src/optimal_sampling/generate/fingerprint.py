"""Whether a model's folder still holds what it held: a checkpoint may be overwritten between two calls on one run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from optimal_sampling.config import ModelConfig
from optimal_sampling.vocabulary import resolve_model

__all__ = ["model_facts"]

_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model")
_SAMPLE = 1 << 16  # bytes read at each of a file's places: training changes weights everywhere
_PLACES = 8


def model_facts(models: ModelConfig) -> dict[str, str]:
    """A hash of each model's files, for those that are folders, and the precision that `auto` means on this device.

    A hub id names its content as far as it does.
    """
    from optimal_sampling.engines.device import (  # torch is loaded here
        resolve_device,
        resolve_dtype,
    )

    dtype = str(resolve_dtype(models.dtype, resolve_device(models.device))).removeprefix("torch.")
    folders = {"student": resolve_model(models.student), "teacher": resolve_model(models.teacher)}
    hashes = {
        f"{role}_files": fingerprint(Path(path))
        for role, path in folders.items()
        if Path(path).is_dir()
    }
    return {"precision": dtype, **hashes}


def fingerprint(folder: Path) -> str:
    """Hash of names, sizes and samples of the content of a model's files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        if path.suffix not in _SUFFIXES or not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\x00{size}\x00".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            for place in range(_PLACES):
                file.seek(max(0, size - _SAMPLE) * place // (_PLACES - 1), os.SEEK_SET)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
