"""What the folder of a model has to hold, and what it is where it holds something else."""

from __future__ import annotations

import json
import re
from pathlib import Path

from optimal_sampling.errors import ModelError

__all__ = ["check_model_folder", "check_weight_files", "has_adapter", "safetensors_defect"]

_MERGE = "merge it into the base model with peft's merge_and_unload, and give the saved result"
_OTHER_KINDS = (
    ("adapter_config.json", f"a LoRA adapter without its base model: {_MERGE}"),
    ("*.gguf", "weights for llama.cpp (GGUF): give the model in the form of Transformers"),
    ("model_index.json", "a pipeline of the diffusers library: give the folder of its text model"),
    (
        "params.json",
        "weights in the form of their authors: give the model as Transformers saves it",
    ),
    ("snapshots/*/config.json", "a model in the cache of the hub: give its folder {found}"),
    (
        "checkpoint-*/config.json",
        "the output of a trainer: give one of its checkpoints, as {found}",
    ),
    (
        "checkpoint-*/adapter_config.json",
        f"the output of a trainer of adapters, as {{found}}: {_MERGE}",
    ),
    ("*/config.json", "a folder of models: give one of them, as {found}"),
    ("trainer_state.json", "the state of a trainer without a model: save the model itself"),
    ("zero_to_fp32.py", "a checkpoint of DeepSpeed: run its zero_to_fp32.py and save the model"),
    ("*.distcp", "a distributed checkpoint of PyTorch: convert it and save the model"),
)
"""Files that tell a folder without `config.json`, what it is and what to do; first match wins."""

_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_POINTER = b"version https://git-lfs"


def check_model_folder(name: str, folder: Path) -> None:
    """Raises ModelError where `folder`, of the model `name`, is not the folder of a whole model."""
    if not (folder / "config.json").is_file():
        kind = _other_kind(folder)
        what = f"it is {kind}" if kind else f"there is no {folder / 'config.json'}"
        raise ModelError(f"the folder of model {name!r} is no complete model: {what}")
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists():
            raise ModelError(
                f"the folder of model {name!r} is not complete: {file} is a link to a file that is "
                "not there; download it again"
            )
        if file.is_file() and _is_pointer(file):
            raise ModelError(
                f"the folder of model {name!r} is not complete: {file} is a pointer of Git LFS, "
                f"not the file itself; run `git lfs pull` in {folder}"
            )


def check_weight_files(name: str, folder: Path) -> None:
    """Raises ModelError, which begins with `name`, where a folder has no weights in safetensors."""
    if not folder.is_dir() or any(folder.glob("*.safetensors*")):
        return
    problem = "it has no weights"
    if any(folder.glob("*.gguf")):
        problem = "its weights are for llama.cpp (GGUF), which are not read"
    if any(file for pattern in _PICKLED for file in folder.glob(pattern)):
        problem = "its weights are pickled, and reading those runs code"
    raise ModelError(
        f"{name} has no file *.safetensors: {problem}; give a folder to which the model was saved "
        "with save_pretrained"
    )


def safetensors_defect(folder: Path) -> str:
    """Which of a folder's files of weights is cut short or missing; "" where none is.

    A folder without any has no defect.
    """
    files = {path.name: path for path in folder.glob("*.safetensors")}
    for name, path in sorted(files.items()):
        if not _is_whole(path):
            return f"{name} is cut short"
    indices = sorted(folder.glob("*.safetensors.index.json"))
    for index in indices:
        try:
            shards = {*json.loads(index.read_bytes())["weight_map"].values()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return f"{index.name} is cut short"
        if missing := sorted(shards - files.keys()):
            return f"{missing[0]} is missing"
    if not indices and any(re.search(r"-of-\d+", name) for name in files):
        return "its weights are in several files, and their index is missing"
    return ""


def _is_whole(path: Path) -> bool:
    """Whether a file is as long as its header says (safetensors: 8 bytes, header, data)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if not 0 < length <= size - 8:
                return False
            header = json.loads(file.read(length))
        ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
        return bool(size == 8 + length + max(ends, default=0))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def has_adapter(path: str) -> bool:
    """Whether a LoRA adapter lies beside the model of a folder or hub id.

    With peft installed Transformers then loads both, and the model alone without it.
    """
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(path) is not None


def _other_kind(folder: Path) -> str:
    for pattern, kind in _OTHER_KINDS:
        found = [file.parent for file in folder.glob(pattern)]
        if found:
            latest = max(found, key=lambda parent: (len(parent.name), parent.name))
            return kind.format(found=latest)
    return ""


def _is_pointer(file: Path) -> bool:
    if file.stat().st_size > 1024:
        return False
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER
