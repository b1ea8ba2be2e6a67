"""Overrides of vLLM's V1 model runner (`VLLM_USE_V2_MODEL_RUNNER=0`)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from optimal_sampling.engines.vllm.runner_mixin import RunnerMixin

__all__ = ["V1RunnerMixin"]


class V1RunnerMixin(RunnerMixin):
    """A base class in front of vllm/v1/worker/gpu_model_runner.py's GPUModelRunner."""

    def init_mixture_state(self: Any) -> None:
        """Set the attributes of the mixin."""
        super().init_mixture_state()
        self._in_step = False

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step, with its requests noted before."""
        self._update_requests(scheduler_output)
        self._in_step = True
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._in_step = False

    def _model_forward(
        self: Any,
        input_ids: Int[Tensor, " tokens"] | None = None,
        positions: Int[Tensor, " tokens"] | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """vLLM's forward pass; one per model where they run different tokens."""
        if self._in_step:
            self._set_order(self.input_batch.req_ids)
            if not self._is_common():
                return self._forward_separately(input_ids, positions)
        else:  # profiling or warm-up
            self.get_model().expected = None
        forward = super()._model_forward  # type: ignore[misc]
        return forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def _block_size(self: Any) -> int:
        return int(self.input_batch.block_table[0].block_size)

    def _blocks(self: Any) -> tuple[Int[Tensor, "requests blocks"], int]:
        table = self.input_batch.block_table[0]
        return table.get_device_tensor(len(self.input_batch.req_ids)), self._block_size()

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """vLLM's sampling, without the seeded generators of unfinished prompts.

        What such a row draws is discarded. vLLM rewinds its generator afterwards, which generators
        of a CPU cannot do.
        """
        generators = self.input_batch.generators
        discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        kept = {index: generators.pop(index) for index in discarded if index in generators}
        try:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        finally:
            generators.update(kept)

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's bookkeeping, and the traces of the tokens drawn."""
        result = super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]
        valid_sampled_token_ids = result[3]
        self._record(valid_sampled_token_ids)
        return result
