"""`optimal-sampling bench`: ratios measured in one run, on the machine it runs on.

measure.py   interleaved repeats, medians, wall clock and CPU time
workload.py  the prompts, and the models to run them with
peers.py     the same work as a user of Transformers would write it
speed.py     the table of sampling speeds
drafts.py    the table of draft lengths
scaling.py   time and memory against the number of prompts, and an oversized batch
solver.py    what the mixture costs, without models
command.py   the options, and the line of JSON at the end
"""

from __future__ import annotations

from optimal_sampling.bench.command import BenchOptions, run_bench

__all__ = ["BenchOptions", "run_bench"]
