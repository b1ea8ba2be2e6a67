"""Overrides of vLLM's V2 model runner, which vLLM takes where Triton runs."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from optimal_sampling.engines.vllm.runner_mixin import RunnerMixin

__all__ = ["V2RunnerMixin"]


class V2RunnerMixin(RunnerMixin):
    """A base class in front of vllm/v1/worker/gpu/model_runner.py's GPUModelRunner."""

    def execute_model(
        self: Any,
        scheduler_output: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        """vLLM's step; without CUDA graphs where the models run different tokens.

        A graph is recorded for both models over the same tokens. In a step that is no dummy run,
        `is_profile` has no other effect than to leave graphs out.
        """
        if not dummy_run:
            self._update_requests(scheduler_output)
            kwargs["is_profile"] = bool(self._scheduled) and not self._is_common()
        execute = super().execute_model  # type: ignore[misc]
        return execute(scheduler_output, intermediate_tensors, dummy_run, **kwargs)

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's inputs, which settle the order of the requests. Not called in dummy runs."""
        batch = super().prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        self._set_order(batch.req_ids)
        self.get_model().separate_forward = None if self._is_common() else self._forward_separately
        return batch

    def _block_size(self: Any) -> int:
        return int(self.block_tables.block_sizes[0])

    def _blocks(self: Any) -> tuple[Int[Tensor, "requests blocks"], int]:
        # vLLM has gathered the step's rows before the model runs.
        table = self.block_tables.input_block_tables[0]
        return table[: len(self._scheduled)], self._block_size()

    @torch.inference_mode()
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """vLLM's sampling, and the traces of the tokens drawn."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self._rows:
            output.copy_event.synchronize()
            counts = output.num_sampled_tokens_np.tolist()
            tokens = output.sampled_token_ids.tolist()
            self._record([ids[:count] for ids, count in zip(tokens, counts, strict=True)])
        return output
