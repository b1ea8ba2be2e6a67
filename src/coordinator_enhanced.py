"""The classes of `optimal_sampling.api.servers` under an earlier name of the module."""

from optimal_sampling.api.servers import CoordinatorResult, EnhancedDualVLLMCoordinator

__all__ = ["CoordinatorResult", "EnhancedDualVLLMCoordinator"]
