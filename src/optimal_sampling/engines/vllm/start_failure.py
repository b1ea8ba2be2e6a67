"""Why a process of vLLM did not start, for the process that started it: vLLM passes no reason on.

The reason lies in a file whose name is in the environment. Importing this does not import vLLM.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optimal_sampling import errors
from optimal_sampling.errors import ConfigError, EngineError, OptimalSamplingError

__all__ = ["GUARD", "first_line", "reason_passed_on", "reported"]

GUARD = "put the code that opens an engine under `if __name__ == '__main__':`"

_VARIABLE = "OPTIMAL_SAMPLING_START_FAILURE"
_KINDS = ("ConfigError", "ModelError", "MissingDependencyError")
_MEMORY = (
    "memory for the KV cache",
    "KV cache is needed",
    "cache blocks",
    "desired GPU memory utilization",
    "allocation is less than requested memory for kv",
)
"""What vLLM's messages about too little memory have in common."""


@contextmanager
def reason_passed_on() -> Iterator[None]:
    """Raise an OptimalSamplingError where vLLM does not start, with its workers' own reason."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reason.json"
        os.environ[_VARIABLE] = str(file)
        try:
            yield
        except Exception as error:  # of vLLM or a model: any kind
            raise (_read(file) or start_error(error)) from error
        finally:
            os.environ.pop(_VARIABLE, None)


def reported(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a worker that leaves the reason of its failure for the process that waits."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            _write(start_error(error))
            raise

    return call


def _write(error: OptimalSamplingError) -> None:
    file = os.environ.get(_VARIABLE)
    if file and Path(file).parent.is_dir():
        reason = {"kind": type(error).__name__, "text": str(error)}
        Path(file).write_text(json.dumps(reason))


def _read(file: Path) -> OptimalSamplingError | None:
    if not file.exists():
        return None
    reason = json.loads(file.read_text())
    kind = getattr(errors, reason["kind"]) if reason["kind"] in _KINDS else EngineError
    found: OptimalSamplingError = kind(reason["text"])
    return found


def start_error(error: Exception) -> OptimalSamplingError:
    """What is raised where vLLM did not start.

    A ConfigError where it refused an option, or found too little memory for the KV cache.
    """
    if isinstance(error, OptimalSamplingError):
        return error
    text = str(error).strip()
    if not isinstance(error, ValueError):
        hint = f" In a script, {GUARD}." if "WorkerProc" in text else ""
        kind = type(error).__name__
        return EngineError(f"vLLM did not start: {kind}: {first_line(text)}{hint}")
    if any(words in text for words in _MEMORY):
        said = text.partition(". ")[0]
        return ConfigError(
            f"too little memory for the KV cache (vLLM: {said}): give it more by kv_memory_gib or "
            "gpu_memory_utilization (kv_cache_memory_bytes of OptimalSamplingV1), or lower "
            "max_model_len"
        )
    return ConfigError(f"vLLM refuses these options: {text}")


def first_line(text: str) -> str:
    """Of an error of vLLM, which can be a page long."""
    return text.strip().partition("\n")[0]
