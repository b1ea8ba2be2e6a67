"""Rows of a dataset -> records, in one process.

    job          `generate`: the order of the work
    dataset      the rows
    fingerprint  hashes of the models' files
    progress     counts of a run, shown while it goes and in the summary at its end

Torch is loaded when there is a sample to generate.
"""

from __future__ import annotations

from optimal_sampling.generate.job import Interrupted, generate, preview
from optimal_sampling.generate.progress import Summary

__all__ = ["Interrupted", "Summary", "generate", "preview"]
