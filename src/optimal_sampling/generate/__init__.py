"""Prompts of a dataset -> records of q*, in one process. Torch is loaded when there is something to generate."""

from __future__ import annotations

from optimal_sampling.generate.job import Interrupted, generate, preview
from optimal_sampling.generate.summary import Summary

__all__ = ["Interrupted", "Summary", "generate", "preview"]
