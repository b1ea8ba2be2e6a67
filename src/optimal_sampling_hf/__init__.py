"""The package's name in the documents this project comes from. The same two classes as in `optimal_sampling`."""

from optimal_sampling.api.local import OptimalSamplingModel, SamplingOutput

__all__ = ["OptimalSamplingModel", "SamplingOutput"]
