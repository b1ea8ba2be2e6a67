"""The mathematics: two rows of logits and noise in, one token and its diagnostics out. No models, no files."""

from optimal_sampling.distribution.methods import METHODS
from optimal_sampling.distribution.noise import gumbel, keys_tensor
from optimal_sampling.distribution.step import Step, draft, step

__all__ = ["METHODS", "Step", "draft", "gumbel", "keys_tensor", "step"]
