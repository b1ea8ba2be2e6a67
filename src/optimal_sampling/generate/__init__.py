"""Rows of a dataset -> records, in one process.

    job          `generate`: the order of the work
    stages       the same in passes over the prompts without a correct completion
    recipes      lists of stages: built-in ones, and YAML files
    recorder     requests in flight -> records
    dataset      the rows
    inputs       their prompts, and notes before a run
    dry_run      what a run would do
    fingerprint  hashes of the models' files
    progress     counts of a run, shown while it goes and in the summary at its end
    stage_counts the same of each stage

Torch is loaded when there is a sample to generate.
"""

from __future__ import annotations

from optimal_sampling.generate.dry_run import DryRun, dry_run
from optimal_sampling.generate.job import Interrupted, generate
from optimal_sampling.generate.progress import Summary, folder_status

__all__ = ["DryRun", "Interrupted", "Summary", "dry_run", "folder_status", "generate"]
