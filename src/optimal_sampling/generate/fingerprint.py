"""Hashes of the models' files: a checkpoint may be overwritten between two calls on one run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from optimal_sampling.config import ModelConfig
from optimal_sampling.vocabulary import resolve_model

__all__ = ["model_facts"]

_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model")
# Training changes weights everywhere, so that samples of a file are enough.
_SAMPLE_BYTES = 1 << 16
_SAMPLES = 8


def model_facts(models: ModelConfig) -> dict[str, str]:
    """The precision of the weights, and a hash of the files of each model that is a folder.

    The content of a hub id is taken as fixed.
    """
    # torch is loaded here
    from optimal_sampling.engines.device import resolve_device, resolve_dtype

    dtype = resolve_dtype(models.dtype, resolve_device(models.device))
    facts = {"precision": str(dtype).removeprefix("torch.")}
    for role, name in (("student", models.student), ("teacher", models.teacher)):
        folder = Path(resolve_model(name))
        if folder.is_dir():
            facts[f"{role}_files"] = fingerprint(folder)
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
