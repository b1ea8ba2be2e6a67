"""The hooks of vLLM's first model runner (`VLLM_USE_V2_MODEL_RUNNER=0`), whose `_model_forward` is made for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from optimal_sampling.engines.vllm.step import StepMixin

__all__ = ["FirstRunnerMixin"]


class FirstRunnerMixin(StepMixin):
    """Goes before vllm/v1/worker/gpu_model_runner.py's GPUModelRunner."""

    def adopt(self: Any) -> None:
        """See StepMixin."""
        super().adopt()
        self._in_step = False

    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Remember what is scheduled while vLLM's own step runs."""
        self._admit(scheduler_output)
        self._in_step = True
        try:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        finally:
            self._in_step = False

    def _model_forward(
        self: Any,
        input_ids: Tensor | None = None,
        positions: Tensor | None = None,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Both models over the step; each over its own tokens where a request's prompts differ."""
        if self._in_step:
            self._announce(self.input_batch.req_ids)
            if not self._is_common():
                return self._forward_apart(input_ids, positions)
        else:  # a trial run
            self.get_model().expected = None
        forward = super()._model_forward  # type: ignore[misc]
        return forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def _blocks(self: Any) -> tuple[Tensor, int]:
        """See StepMixin."""
        table = self.input_batch.block_table[0]
        return table.get_device_tensor(len(self.input_batch.req_ids)), table.block_size

    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """A row of an unfinished prompt draws nothing that counts, so its seeded generator is put aside.

        vLLM turns the generator back instead, which those of a CPU cannot do.
        """
        generators = self.input_batch.generators
        discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0]
        aside = {
            int(index): generators.pop(int(index))
            for index in discarded
            if int(index) in generators
        }
        try:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        finally:
            generators.update(aside)

    def _bookkeeping_sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, and the traces of the tokens that it finds drawn."""
        result = super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]
        self._record(result[3])
        return result
