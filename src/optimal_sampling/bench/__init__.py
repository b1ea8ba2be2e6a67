"""`optimal-sampling bench`: ratios measured in one run, on the machine it runs on.

subcommands.py    the options of each subcommand
harness.py        interleaved repeats, medians, ratios, tables, and the line of JSON at the end
hardware.py       the machine: names, memory bandwidth, the roofline of lockstep decoding
workload.py       prompts, and the two models that answer them
architectures.py  two models with random weights of known architectures
instruments.py    what is recorded of an engine's rounds; emulated acceptance of drafts
baselines.py      the same work as a user of Transformers would write it
speed.py          `speed`, `drafts`: tokens per second
selfdistil.py     `selfdistil`: one model as teacher and student
footprint.py      `memory`, `scaling`: KV caches, admission, growth with the number of prompts
identity.py       `identity`: speculative decoding against lockstep, bit for bit
mixture_cost.py   `solver`: the mixture without a model
large_shapes.py   `gpu`: a table of large shapes, within a budget of time
"""

from __future__ import annotations

from optimal_sampling.bench.harness import run_bench
from optimal_sampling.bench.subcommands import BenchOptions, parse_bench

__all__ = ["BenchOptions", "parse_bench", "run_bench"]
