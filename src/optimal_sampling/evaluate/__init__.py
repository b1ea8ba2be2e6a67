"""Scores of checkpoints on benchmarks.

statistics      avg@k, pass@k, maj@k, intervals, paired differences: pure functions on arrays
tables          the scores as JSON, Markdown and a terminal table
"""
