"""The options of `coordinator_enhanced`."""

from optimal_sampling.api.servers import EnhancedCoordinatorConfig

__all__ = ["EnhancedCoordinatorConfig"]
