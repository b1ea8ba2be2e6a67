"""Text for distillation: each token drawn from the geometric mixture of a teacher and a student.

`generate(GenerateConfig(...))` turns a dataset into records; `load(ModelConfig(...))` gives an
engine. The classes for lists of prompts load torch when they are first used; importing this loads
none.
"""

from __future__ import annotations

import optimal_sampling.interrupts  # noqa: F401 - before all that takes time

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING, Any

from optimal_sampling.config import GenerateConfig
from optimal_sampling.engines import load
from optimal_sampling.generate import generate
from optimal_sampling.version import __version__

if TYPE_CHECKING:
    from optimal_sampling.api.local import OptimalSamplingModel as OptimalSamplingModel
    from optimal_sampling.api.local import SamplingOutput as SamplingOutput
    from optimal_sampling.api.servers import EnhancedCoordinatorConfig as EnhancedCoordinatorConfig
    from optimal_sampling.api.servers import (
        EnhancedDualVLLMCoordinator as EnhancedDualVLLMCoordinator,
    )
    from optimal_sampling.api.vllm import OptimalSamplingOutput as OptimalSamplingOutput
    from optimal_sampling.api.vllm import OptimalSamplingV1 as OptimalSamplingV1
    from optimal_sampling.report.plot import plot_alpha as plot_alpha

_MODULES = {
    "EnhancedCoordinatorConfig": "optimal_sampling.api.servers",
    "EnhancedDualVLLMCoordinator": "optimal_sampling.api.servers",
    "OptimalSamplingModel": "optimal_sampling.api.local",
    "OptimalSamplingOutput": "optimal_sampling.api.vllm",
    "OptimalSamplingV1": "optimal_sampling.api.vllm",
    "SamplingOutput": "optimal_sampling.api.local",
    "plot_alpha": "optimal_sampling.report.plot",
}

__all__ = [
    "EnhancedCoordinatorConfig",
    "EnhancedDualVLLMCoordinator",
    "GenerateConfig",
    "OptimalSamplingModel",
    "OptimalSamplingOutput",
    "OptimalSamplingV1",
    "SamplingOutput",
    "__version__",
    "generate",
    "load",
    "plot_alpha",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
