"""`optimal-sampling bench`: ratios measured in one run, on the machine it runs on.

subcommands.py    the options of each subcommand
harness.py        interleaved repeats, medians, ratios, tables, the machine, the line of JSON
workload.py       prompts, the two models that answer them, and the roofline of lockstep decoding
architectures.py  two models with random weights of known architectures
instruments.py    what is recorded of an engine's rounds; emulated acceptance of drafts
baselines.py      the same work as a user of Transformers would write it
speed.py          `speed`, `drafts`, `selfdistil`: tokens per second
methods.py        `methods`: tokens per second and accepted drafts by method and sharpness
costs.py          `memory`, `scaling`, `solver`: caches, growth with the prompts, the mixture alone
host.py           `host`: CPU time of the paged engine's rounds, without a GPU
fleet.py          `fleet`: worker processes, and what their driver costs
identity.py       `identity`: speculative decoding against lockstep, bit for bit
large_shapes.py   `gpu`: a table of large shapes, within a budget of time
cells.py          single figures of that table
own_process.py    work in a process that may die
"""

from __future__ import annotations

from optimal_sampling.bench.harness import run_bench
from optimal_sampling.bench.subcommands import BenchOptions, parse_bench

__all__ = ["BenchOptions", "parse_bench", "run_bench"]
