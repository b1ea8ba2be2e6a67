"""The mathematics: two rows of logits and noise in, one token and its diagnostics out."""

from optimal_sampling.distribution.arrays import cuts, keep_largest
from optimal_sampling.distribution.gpu.launch import kernel_note, runs_fused, triton_version
from optimal_sampling.distribution.methods import METHODS
from optimal_sampling.distribution.mixture import (
    Drawn,
    Solved,
    draft,
    draw,
    log_q,
    make_pair,
    row_slices,
    single_step,
    solve,
    solve_single,
    step,
    trace_of,
)
from optimal_sampling.distribution.noise import NoiseKeys, NoiseSource, gumbel, keys_tensor
from optimal_sampling.distribution.pair import teacher_support
from optimal_sampling.distribution.top_tokens import top_tokens

__all__ = [
    "METHODS",
    "Drawn",
    "NoiseKeys",
    "NoiseSource",
    "Solved",
    "cuts",
    "draft",
    "draw",
    "gumbel",
    "keep_largest",
    "kernel_note",
    "keys_tensor",
    "log_q",
    "make_pair",
    "row_slices",
    "runs_fused",
    "single_step",
    "solve",
    "solve_single",
    "step",
    "teacher_support",
    "top_tokens",
    "trace_of",
    "triton_version",
]
