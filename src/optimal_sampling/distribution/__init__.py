"""The mathematics: two rows of logits and noise in, one token and its diagnostics out. No models, no files."""

from optimal_sampling.distribution.fused import kernel_note
from optimal_sampling.distribution.methods import METHODS
from optimal_sampling.distribution.noise import NoiseKeys, gumbel, keys_tensor
from optimal_sampling.distribution.step import Step, confident_draft, draft, step

__all__ = [
    "METHODS",
    "NoiseKeys",
    "Step",
    "confident_draft",
    "draft",
    "gumbel",
    "kernel_note",
    "keys_tensor",
    "step",
]
