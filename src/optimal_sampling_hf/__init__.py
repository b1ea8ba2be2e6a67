"""The classes of `optimal_sampling.api.local` under an earlier name of the package."""

from optimal_sampling.api.local import OptimalSamplingModel, SamplingOutput

__all__ = ["OptimalSamplingModel", "SamplingOutput"]
