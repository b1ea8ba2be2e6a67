"""The hooks of vLLM's second model runner, the one that vLLM takes where Triton runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optimal_sampling.engines.vllm.step import StepMixin

__all__ = ["SecondRunnerMixin"]


class SecondRunnerMixin(StepMixin):
    """Goes before vllm/v1/worker/gpu/model_runner.py's GPUModelRunner."""

    def execute_model(
        self: Any,
        scheduler_output: Any,
        intermediate_tensors: Any = None,
        dummy_run: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Remember what is scheduled, then vLLM's own step; without CUDA graphs where the models see other tokens.

        A graph is recorded for both models over the same tokens. `is_profile` means nothing else in a real step.
        """
        if not dummy_run:
            self._admit(scheduler_output)
            kwargs["is_profile"] = bool(self._parts) and not self._is_common()
        return super().execute_model(scheduler_output, intermediate_tensors, dummy_run, **kwargs)  # type: ignore[misc]

    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, which settles the order of the requests. Trial runs do not come here."""
        batch = super().prepare_inputs(*args, **kwargs)  # type: ignore[misc]
        self._announce(batch.req_ids)
        self.get_model().forward_apart = None if self._is_common() else self._forward_apart
        return batch

    def _blocks(self: Any) -> tuple[Tensor, int]:
        """See StepMixin. vLLM has gathered the step's rows before it runs the model."""
        return self.block_tables.input_block_tables[0][
            : len(self._parts)
        ], self.block_tables.block_sizes[0]

    @torch.inference_mode()
    def sample_tokens(self: Any, grammar_output: Any) -> Any:
        """vLLM's, and the traces of the tokens that were drawn."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if self._rows:
            output.copy_event.synchronize()
            counts = output.num_sampled_tokens_np.tolist()
            tokens = output.sampled_token_ids.tolist()
            self._record([ids[:count] for ids, count in zip(tokens, counts, strict=True)])
        return output
