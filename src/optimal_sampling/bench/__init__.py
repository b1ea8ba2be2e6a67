"""`optimal-sampling bench`: ratios measured in one run, on the machine it runs on.

options.py     the options
hardware.py    where and with what
measure.py     interleaved repeats, medians, wall clock and CPU time
workload.py    a pair of models, and the prompts they answer
shapes.py      the same with random weights of a known architecture
pairs.py       which of the two the options ask for
watch.py       what is seen of a run's rounds; emulated acceptance of drafts
peers.py       the same work as a user of Transformers would write it
contenders.py  what can be timed, by name
roofline.py    what memory bandwidth alone allows
speed.py       the table of sampling speeds
drafts.py      the same by draft length
selfdistil.py  one model as teacher and student, with and without a solution in the teacher's prompt
scaling.py     time and memory against the number of prompts, and an oversized batch
memory.py      KV caches predicted and measured, admission and preemption
identity.py    speculative = lockstep, bit for bit
solver.py      what the mixture costs, without models
gpu.py         the table of large shapes, within a budget of time
gpu_cells.py   what it measures
gpu_tables.py  what it is held against, and how it is shown
report.py      what each of them hands back
command.py     tables, and the line of JSON at the end
"""

from __future__ import annotations

from optimal_sampling.bench.command import run_bench
from optimal_sampling.bench.options import BenchOptions

__all__ = ["BenchOptions", "run_bench"]
