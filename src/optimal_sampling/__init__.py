"""Optimal Sampling: text for distillation, each token drawn from the geometric mixture of a teacher and a student.

Importing this loads no torch; the names below load what they need when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimal_sampling.version import __version__

if TYPE_CHECKING:
    from optimal_sampling.engines.vllm.front import OptimalSamplingOutput as OptimalSamplingOutput
    from optimal_sampling.engines.vllm.front import OptimalSamplingV1 as OptimalSamplingV1
    from optimal_sampling.model import OptimalSamplingModel as OptimalSamplingModel
    from optimal_sampling.model import SamplingOutput as SamplingOutput

_HOMES = {
    "OptimalSamplingModel": "optimal_sampling.model",
    "OptimalSamplingOutput": "optimal_sampling.engines.vllm.front",
    "OptimalSamplingV1": "optimal_sampling.engines.vllm.front",
    "SamplingOutput": "optimal_sampling.model",
}

__all__ = [
    "OptimalSamplingModel",
    "OptimalSamplingOutput",
    "OptimalSamplingV1",
    "SamplingOutput",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
