"""The student as draft model beside a teacher with another number of rows of logits.

vLLM wants a draft model to have as many rows as its target. Families pad their vocabularies differently, so the
student's rows are filled up with -inf, or its surplus rows left out; ids that the student has no embedding for (they
can only stand in a teacher's prompt) are read as its last one. Neither touches what is drawn: drafts are proposals.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from optimal_sampling.engines.vllm.plugin import DRAFT_ARCHITECTURE

__all__ = ["OptimalSamplingDraftForCausalLM", "PairOverrides"]

_OWN = "optimal_sampling_draft"


@dataclass(frozen=True)
class PairOverrides:
    """vLLM's `hf_overrides` as a callable, which vLLM applies to target and draft alike; tells them by their rows."""

    teacher: dict[str, Any]
    """Fields of the teacher's config to replace."""
    teacher_rows: int
    student_rows: int

    def __call__(self, config: Any) -> Any:
        """The config as vLLM is to see it. A second call changes nothing."""
        if hasattr(config, _OWN):
            return config
        rows = getattr(config, "vocab_size", None)  # vLLM first shows a config without fields
        if rows == self.teacher_rows:
            config.update(self.teacher)
        elif rows == self.student_rows:
            own = {"architectures": list(config.architectures), "rows": rows}
            config.update(
                {_OWN: own, "vocab_size": self.teacher_rows, "architectures": [DRAFT_ARCHITECTURE]}
            )
        return config


class OptimalSamplingDraftForCausalLM(nn.Module):
    """The student, with the teacher's number of rows."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

        super().__init__()
        config = vllm_config.model_config.hf_config
        own = getattr(config, _OWN)
        self.rows, self.width = int(own["rows"]), int(config.vocab_size)
        inner = copy.deepcopy(config)
        inner.update({"vocab_size": self.rows, "architectures": own["architectures"]})
        self.inner = init_vllm_registered_model(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "inner"),
            hf_config=inner,
            architectures=own["architectures"],
        )

    def embed_input_ids(self, input_ids: Int[Tensor, " tokens"]) -> Tensor:
        """The student's embeddings."""
        embedded: Tensor = self.inner.embed_input_ids(input_ids.clamp(max=self.rows - 1))
        return embedded

    def forward(
        self, input_ids: Tensor, positions: Tensor, *args: Any, **kwargs: Any
    ) -> Float[Tensor, "tokens hidden"]:
        """The student's hidden states, [tokens, hidden]."""
        hidden: Tensor = self.inner(input_ids.clamp(max=self.rows - 1), positions, *args, **kwargs)
        return hidden

    def compute_logits(
        self, hidden_states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows width"]:
        """The student's logits, filled up with -inf or cut."""
        logits: Tensor = self.inner.compute_logits(hidden_states)[..., : self.width]
        return torch.nn.functional.pad(logits, (0, self.width - logits.shape[-1]), value=-torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The student's own weights."""
        from vllm.model_executor.models.utils import AutoWeightsLoader

        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            (f"inner.{name}", each) for name, each in weights
        )
        return loaded
