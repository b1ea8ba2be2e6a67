"""The student as draft model of a teacher with another number of logits.

vLLM requires a draft model to have as many logits as its target, and model families pad their
vocabularies differently. So the student's logits are padded with -inf or cut, and ids for which it
has no embedding (they occur only in a teacher's prompt) are replaced by its last one. Drafts are
proposals: neither changes the distribution that is drawn from.
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
"""Key of the student's own architectures and number of logits in its changed config."""


@dataclass(frozen=True)
class PairOverrides:
    """A callable for vLLM's `hf_overrides`, which vLLM applies to target and draft model alike.

    The two are distinguished by their number of logits.
    """

    teacher: dict[str, Any]
    """Fields of the teacher's config to replace."""
    teacher_rows: int
    """Number of the teacher's logits."""
    student_rows: int
    """Number of the student's logits."""

    def __call__(self, config: Any) -> Any:
        """The changed config. A second call has no effect."""
        if hasattr(config, _OWN):
            return config
        rows = getattr(config, "vocab_size", None)  # vLLM's first call has a config without fields
        if rows == self.teacher_rows:
            config.update(self.teacher)
        elif rows == self.student_rows:
            own = {"architectures": list(config.architectures), "rows": rows}
            config.update(
                {_OWN: own, "vocab_size": self.teacher_rows, "architectures": [DRAFT_ARCHITECTURE]}
            )
        return config


class OptimalSamplingDraftForCausalLM(nn.Module):
    """The student with the teacher's number of logits."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix

        super().__init__()
        config = vllm_config.model_config.hf_config
        own = getattr(config, _OWN)
        self.rows = int(own["rows"])
        self.width = int(config.vocab_size)
        inner = copy.deepcopy(config)
        inner.update({"vocab_size": self.rows, "architectures": own["architectures"]})
        self.inner = init_vllm_registered_model(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "inner"),
            hf_config=inner,
            architectures=own["architectures"],
        )

    def embed_input_ids(self, input_ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens hidden"]:
        """The student's embeddings."""
        embedded: Tensor = self.inner.embed_input_ids(input_ids.clamp(max=self.rows - 1))
        return embedded

    def forward(
        self,
        input_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        *args: Any,
        **kwargs: Any,
    ) -> Float[Tensor, "tokens hidden"]:
        """The student's hidden states."""
        hidden: Tensor = self.inner(input_ids.clamp(max=self.rows - 1), positions, *args, **kwargs)
        return hidden

    def compute_logits(
        self, hidden_states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows width"]:
        """The student's logits, padded with -inf or cut to the teacher's number."""
        logits: Tensor = self.inner.compute_logits(hidden_states)[..., : self.width]
        missing = self.width - logits.shape[-1]
        return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the student's weights."""
        from vllm.model_executor.models.utils import AutoWeightsLoader

        named = ((f"inner.{name}", weight) for name, weight in weights)
        loaded: set[str] = AutoWeightsLoader(self).load_weights(named)
        return loaded
