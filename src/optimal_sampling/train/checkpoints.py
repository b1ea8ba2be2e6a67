"""Which checkpoints of a training folder are complete. Loads no weights and no torch."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from optimal_sampling.vocabulary.model_folder import safetensors_defect

__all__ = ["Checkpoints", "defect", "find_checkpoints"]

_NAME = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("*.safetensors", "pytorch_model_fsdp*")
_STATE = ("optimizer*", "scheduler.pt", "rng_state*")
_ZIPPED = ("*.pt", "*.pth", "*.bin")
"""Files of torch.save, which are zip files and end with a directory."""
_OTHER_ZIPPED = "training_args.bin"  # of other trainers; not read when training goes on


@dataclass(frozen=True)
class Checkpoints:
    """The newest complete checkpoint, and newer ones that are not."""

    last: Path | None
    incomplete: tuple[tuple[Path, str], ...] = ()
    """With what is wrong in each."""


def find_checkpoints(folder: Path) -> Checkpoints:
    """Looks from the newest `checkpoint-STEP` down to the first complete one."""
    found = {int(m[1]): path for path in _entries(folder) if (m := _NAME.fullmatch(path.name))}
    incomplete: list[tuple[Path, str]] = []
    for step in sorted(found, reverse=True):
        reason = defect(found[step])
        if not reason:
            return Checkpoints(found[step], tuple(incomplete))
        incomplete.append((found[step], reason))
    return Checkpoints(None, tuple(incomplete))


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def defect(checkpoint: Path) -> str:
    """What keeps training from going on from a checkpoint; "" where nothing does.

    The Trainer writes `trainer_state.json` last. Sizes are checked too, because a copy may have
    been cut short.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        step = int(state["global_step"])
    except FileNotFoundError:
        return "it has no trainer_state.json, which is written last"
    except (OSError, ValueError, KeyError, TypeError):
        return "its trainer_state.json is cut short"
    if not checkpoint.name.endswith(f"-{step}"):
        return f"its trainer_state.json is of step {step}"
    for patterns, what in ((_WEIGHTS, "weights"), *(((name,), name) for name in _STATE)):
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"it has no {what}"
    return _cut_file(checkpoint)


def _cut_file(checkpoint: Path) -> str:
    if reason := safetensors_defect(checkpoint):
        return reason
    for pattern in _ZIPPED:
        for path in sorted(checkpoint.glob(pattern)):
            if path.name != _OTHER_ZIPPED and not zipfile.is_zipfile(path):
                return f"{path.name} is cut short"
    return ""
