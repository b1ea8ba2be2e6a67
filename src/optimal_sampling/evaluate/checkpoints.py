"""The checkpoints below a folder: complete ones, half-written ones, and those to merge first."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optimal_sampling.config import expand_user
from optimal_sampling.errors import ConfigError, ModelError
from optimal_sampling.vocabulary.model_folder import safetensors_defect

__all__ = ["Checkpoint", "Skipped", "find_checkpoints"]

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.distcp", "*/*.distcp")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "*.tiktoken")
_INNER = re.compile(r"global_step\d+|optimizer_\d+|pytorch_model_fsdp_\d+|\..*")
"""Folders that hold parts of a checkpoint, or nothing to see."""
_MERGED = "-merged"
_PARTS = ("adapter_model.*", "pytorch_model_fsdp*/*", "global_step*/*")
"""Files of an adapter, and of shards of FSDP and DeepSpeed."""
_MERGE_ADAPTER = (
    "from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
    "M.from_pretrained({folder!r}).merge_and_unload().save_pretrained({merged!r}); "
    "T.from_pretrained({tokenizer!r}).save_pretrained({merged!r})"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate."""

    label: str
    """Its name in the tables."""
    model: str
    """A folder, a hub id, or a shipped model."""


@dataclass(frozen=True)
class Skipped:
    """A folder of weights that cannot be evaluated as it is."""

    label: str
    reason: str
    is_half_written: bool
    """Training may still be at it; else something has to be done first."""


def find_checkpoints(
    checkpoint_dir: str | None, extra_models: Sequence[str], leave_out: str = ""
) -> tuple[list[Checkpoint], list[Skipped]]:
    """The extra models as given, then the checkpoints of a folder in the order of their numbers.

    `leave_out`: a folder below which nothing is looked for. Raises ModelError where a folder holds
    no complete checkpoint, or no model is one, ConfigError for a model that is given twice.
    """
    if not checkpoint_dir and not extra_models:
        raise ConfigError("name what to evaluate: --checkpoint-dir FOLDER or --extra-models NAME")
    named = _named(extra_models)
    parts = {each.label: _unmerged(Path(each.model)) for each in named}
    found = [each for each in named if not parts[each.label]]
    skipped = [Skipped(label, reason, False) for label, reason in parts.items() if reason]
    if checkpoint_dir:
        complete, incomplete = _search(Path(checkpoint_dir), leave_out)
        found += complete
        skipped += incomplete
    if not found:
        raise ModelError("\n".join(f"{each.label} is {each.reason}" for each in skipped))
    labels = [each.label for each in found]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label!r} is given twice in --extra-models and --checkpoint-dir")
    return found, skipped


def _named(names: Sequence[str]) -> list[Checkpoint]:
    """Hub ids as they are; folders by their name, or by their path where two names are equal."""
    folders = [_usable(expand_user(name).resolve()) for name in names]
    last = [folder.name for folder in folders]
    checkpoints = []
    for name, folder in zip(names, folders, strict=True):
        if not folder.is_dir():
            checkpoints.append(Checkpoint(name, name))
        else:
            is_unique = last.count(folder.name) == 1
            checkpoints.append(Checkpoint(folder.name if is_unique else str(folder), str(folder)))
    return checkpoints


def _search(given: Path, leave_out: str) -> tuple[list[Checkpoint], list[Skipped]]:
    root = expand_user(given).resolve()
    if not root.is_dir():
        raise ModelError(f"--checkpoint-dir {given} is no folder (looked for {root})")
    complete, skipped = [], []
    found = sorted(_candidates(root, leave_out), key=_natural)
    for folder in dict.fromkeys(map(_usable, found)):
        is_below = root in folder.parents
        label = folder.relative_to(root).as_posix() if is_below else folder.name
        problem = _problem(label, folder)
        if problem is None:
            complete.append(Checkpoint(label, str(folder)))
        else:
            skipped.append(problem)
    if complete:
        return complete, skipped
    reasons = "".join(f"\n  {each.label}: {each.reason}" for each in skipped)
    raise ModelError(
        f"--checkpoint-dir {given} holds no complete checkpoint: a folder with config.json, "
        f"*.safetensors and a tokenizer{'; found:' if reasons else ''}{reasons}"
    )


def _candidates(root: Path, leave_out: str) -> Iterator[Path]:
    """Folders that hold a checkpoint or a part of one; links are followed once."""
    left_out = Path(leave_out).resolve() if leave_out else None
    seen: set[Path] = set()
    for name, children, _ in os.walk(root, followlinks=True):
        folder = Path(name)
        if folder.resolve() in seen or folder.resolve() == left_out:
            children.clear()
            continue
        seen.add(folder.resolve())
        children[:] = sorted(each for each in children if not _INNER.fullmatch(each))
        if _is_candidate(folder):
            yield folder


def _is_candidate(folder: Path) -> bool:
    marks = (*_WEIGHTS, "adapter_config.json", "trainer_state.json", "zero_to_fp32.py")
    if any(any(folder.glob(pattern)) for pattern in marks):
        return True
    config = _json(folder / "config.json")
    return isinstance(config, dict) and bool({"model_type", "architectures"} & config.keys())


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key: numbers by value, so that checkpoint-20 comes before checkpoint-100."""
    parts = re.findall(r"\d+|\D+", str(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _problem(label: str, folder: Path) -> Skipped | None:
    """Why a folder is no complete checkpoint; None where it is one."""
    if reason := _unmerged(folder):
        return Skipped(label, reason, is_half_written=False)
    files = list(folder.glob("*.safetensors"))
    if not files and any(folder.glob("pytorch_model*.bin")):
        reason = "its weights are pickled, which runs code; save it with save_pretrained"
        return Skipped(label, reason, is_half_written=False)
    half = _half_written(folder, files)
    if half:
        return Skipped(label, f"half-written: {half}", is_half_written=True)
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        reason = "it has no tokenizer; copy that of the model it was trained from into it"
        return Skipped(label, reason, is_half_written=False)
    return None


def _half_written(folder: Path, files: Sequence[Path]) -> str:
    """What is missing of a checkpoint in safetensors; "" where nothing is."""
    if not isinstance(_json(folder / "config.json"), dict):
        return "config.json is missing or cut short"
    if not files:
        return "it has no weights"
    return safetensors_defect(folder)


def _merged(folder: Path) -> Path:
    """Where a merge command puts the result."""
    return folder.with_name(f"{folder.name}{_MERGED}")


def _unmerged(folder: Path) -> str:
    """Why a folder has to be merged, or merged again; "" where it has not."""
    if parts := _newer_parts(folder):
        return f"older than {parts.name}, which it was merged from: {_merge_command(parts)}"
    return _merge_command(folder)


def _newer_parts(merged: Path) -> Path | None:
    """The folder of parts that a model was merged from, if it was trained again afterwards."""
    parts = merged.with_name(merged.name.removesuffix(_MERGED))
    if parts == merged or not _merge_command(parts):
        return None
    written, read = _latest(merged, ("*.safetensors",)), _latest(parts, _PARTS)
    return parts if written is not None and read is not None and read > written else None


def _latest(folder: Path, patterns: Sequence[str]) -> float | None:
    """When the last of the matching files was written; None where there are none."""
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    return max((path.stat().st_mtime for path in files), default=None)


def _usable(folder: Path) -> Path:
    """The folder, or for parts that were merged the result."""
    merged = _merged(folder)
    return merged if _merge_command(folder) and not _problem("", merged) else folder


def _merge_command(folder: Path) -> str:
    """What a folder of parts is, with the command that makes a model of it; "" for another."""
    merged = _merged(folder)
    if (folder / "adapter_config.json").is_file():
        code = _MERGE_ADAPTER.format(
            folder=str(folder), merged=str(merged), tokenizer=_adapter_tokenizer(folder)
        )
        return f"a LoRA adapter; merge it first: {shlex.join(['python', '-c', code])}"
    if any(folder.glob("*.safetensors")):
        return ""
    sharded = next((path.parent for path in folder.glob("pytorch_model_fsdp*/*.distcp")), None)
    if sharded:
        command = shlex.join(["accelerate", "merge-weights", str(sharded), str(merged)])
        return (
            f"shards of FSDP; merge them first: {command}  (then copy config.json and the "
            f"tokenizer of the model it was trained from into {merged})"
        )
    if (folder / "zero_to_fp32.py").is_file():
        script = str(folder / "zero_to_fp32.py")
        words = ["python", script, str(folder), str(merged), "--safe_serialization"]
        return f"shards of DeepSpeed; merge them first: {shlex.join(words)}"
    return ""


def _adapter_tokenizer(folder: Path) -> str:
    """The folder where it has a tokenizer, else the adapter's base model."""
    if any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return str(folder)
    config = _json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return str(base or folder)


def _json(path: Path) -> object:
    """Content of a JSON file; None where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
