"""One token for every row from one model alone: the same noise, temperature and truncation, no mixture."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from optimal_sampling.config import MixtureConfig
from optimal_sampling.distribution.noise import noise_tensor
from optimal_sampling.distribution.step import Noise, Step
from optimal_sampling.distribution.support import keep_largest
from optimal_sampling.types import TRACE_FIELDS

__all__ = ["single_step"]


@torch.no_grad()
def single_step(
    logits: Float[Tensor, "rows vocab"], noise: Noise, mixture: MixtureConfig, role: str
) -> Step:
    """Draw from `student` or `teacher` alone. Diagnostics that take two models are NaN."""
    log_p = (logits.to(torch.float32) / mixture.temperature).log_softmax(-1)
    log_q = log_p
    if mixture.top_k > 0 or mixture.top_p < 1:
        log_q = log_p.masked_fill(
            ~keep_largest(log_p, mixture.top_k, mixture.top_p), -torch.inf
        ).log_softmax(-1)
    token = (log_q + noise_tensor(noise, logits.shape[1])).argmax(-1)
    chosen = log_q.gather(-1, token[:, None])[:, 0]
    bad = chosen.isnan() | (chosen == -torch.inf)
    trace = chosen.new_full((len(token), len(TRACE_FIELDS)), torch.nan)
    trace[:, TRACE_FIELDS.index("alpha")] = float(role == "teacher")
    trace[:, TRACE_FIELDS.index(f"log_p_{role}")] = log_p.gather(-1, token[:, None])[:, 0]
    trace[:, TRACE_FIELDS.index("log_q")] = chosen
    good = torch.zeros_like(bad)
    by_role = (bad, good) if role == "student" else (good, bad)
    return Step(token.masked_fill(bad, 0), trace, *by_role)
