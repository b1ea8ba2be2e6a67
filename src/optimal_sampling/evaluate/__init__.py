"""Scores of checkpoints on benchmarks.

job             checkpoints x benchmarks -> run folders -> tables
options         the options of `evaluate`
benchmarks      the questions, from a file or the hub, and that they stay the same
checkpoints     the complete checkpoints below a folder
samples         records and verdicts -> graded samples
hedging         the share of hedging words
statistics      avg@k, pass@k, maj@k, intervals, paired differences: pure functions on arrays
tables          the scores as JSON, Markdown and terminal tables
lm_eval_bridge  our engines as a model of lm-evaluation-harness, and its tasks
"""

from __future__ import annotations

from optimal_sampling.evaluate.job import Report, evaluate
from optimal_sampling.evaluate.options import EvaluateConfig

__all__ = ["EvaluateConfig", "Report", "evaluate"]
