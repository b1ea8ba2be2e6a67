"""Rows of a dataset -> records, in one process.

    job          `generate`: the order of the work
    dataset      the rows
    fingerprint  hashes of the models' files
    progress     what is shown during a run
    summary      counts of a run, and what is shown at its end

Torch is loaded when there is a sample to generate.
"""

from __future__ import annotations

from optimal_sampling.generate.job import Interrupted, generate, preview
from optimal_sampling.generate.summary import Summary

__all__ = ["Interrupted", "Summary", "generate", "preview"]
