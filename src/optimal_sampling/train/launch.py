"""Several processes: how many, and the torchrun command that starts them."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

from optimal_sampling.errors import MissingDependencyError, UserError
from optimal_sampling.train.options import SftOptions

__all__ = [
    "import_trl",
    "is_launched",
    "is_main_process",
    "launch_command",
    "printable",
    "quiet_but_for_the_main_process",
    "typed_again",
]

_LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
_PATIENCE = 10.0  # seconds


def import_trl() -> None:
    """Raises MissingDependencyError without TRL and what it needs."""
    missing = [name for name in ("trl", "datasets", "accelerate") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"training needs {', '.join(missing)}: pip install '.[train]' "
            "in the folder of this package"
        )


def is_launched() -> bool:
    """Whether torchrun or accelerate started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def launch_command(options: SftOptions, arguments: Sequence[str]) -> list[str]:
    """The torchrun command line of this call; empty where this process trains alone.

    `accelerate launch --cpu --num_processes 2` runs one process (Accelerate 1.15); torchrun runs
    as many as it is told to.
    """
    count = _process_count(options)
    return [] if is_launched() or count == 1 else _command(count, arguments)


def _command(count: int | str, arguments: Sequence[str]) -> list[str]:
    processes = ["--standalone", f"--nproc-per-node={count}"]
    return [*_LAUNCHER, *processes, "-m", "optimal_sampling", "sft", *arguments]


def printable(command: Sequence[str]) -> str:
    """The command as it is typed: `torchrun ...` for `python -m torch.distributed.run`."""
    return shlex.join(["torchrun", *command[len(_LAUNCHER) :]])


def typed_again(arguments: Sequence[str]) -> str:
    """The torchrun command that started this process; "" where there was none."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return printable(_command(count, arguments)) if is_launched() else ""


@contextmanager
def quiet_but_for_the_main_process() -> Iterator[None]:
    """One message instead of one per process, for an error that all of them meet."""
    try:
        yield
    except UserError as error:
        if is_main_process():
            raise
        time.sleep(_PATIENCE)  # the launcher ends all processes when the first one ends
        raise SystemExit(error.exit_code) from error


def _process_count(options: SftOptions) -> int:
    if options.num_processes != "auto":
        return options.num_processes
    if options.use_cpu:
        return 1
    import torch

    return max(1, torch.cuda.device_count())
