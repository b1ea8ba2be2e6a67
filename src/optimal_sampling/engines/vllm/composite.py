"""The model class that vLLM runs: teacher and student side by side, log q* as logits.

What a row of a step is for (which request, which options) is told by the worker before each forward pass; without
that, a row is mixed by the engine's own configuration at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    init_vllm_registered_model,
    maybe_prefix,
)

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.vllm.mixing import Mixed, Row, mix
from optimal_sampling.engines.vllm.options import OPTIONS
from optimal_sampling.engines.vllm.plugin import check_version

__all__ = ["CompositeSettings", "OptimalSamplingForCausalLM"]


@dataclass(frozen=True)
class CompositeSettings:
    """What the engine's arguments say of the pair; travels in the model's config under the key `OPTIONS`."""

    teacher_architectures: list[str]
    student: str
    """Folder or hub id of the student."""
    vocab_size: int
    """Shared token ids; none beyond them is ever drawn."""
    mixture: dict[str, Any]
    """Fields of MixtureConfig for requests that say nothing else."""
    shared: bool = False
    """Both models are the same weights."""
    end_id: int = 0
    """A shared stop id; ends a completion whose logits cannot be drawn from."""
    trust_remote_code: bool = False


class OptimalSamplingForCausalLM(nn.Module):
    """Hidden states are the two models' side by side, [tokens, teacher_hidden + student_hidden]."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_version()
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.settings = CompositeSettings(**getattr(config, OPTIONS))
        self.default = MixtureConfig(**self.settings.mixture)
        self.width: int = vllm_config.model_config.get_vocab_size()
        student_config = AutoConfig.from_pretrained(
            self.settings.student, trust_remote_code=self.settings.trust_remote_code
        )
        self.teacher = init_vllm_registered_model(
            vllm_config=vllm_config,
            prefix=maybe_prefix(prefix, "teacher"),
            hf_config=config,
            architectures=self.settings.teacher_architectures,
        )
        with set_model_tag("student"):  # its compiled graphs are not the teacher's
            self.student = init_vllm_registered_model(
                vllm_config=vllm_config,
                prefix=maybe_prefix(prefix, "student"),
                hf_config=student_config,
                architectures=student_config.architectures,
            )
        self.hidden_sizes = {"teacher": config.get_text_config().hidden_size}
        self.hidden_sizes["student"] = student_config.get_text_config().hidden_size
        if self.settings.shared:
            _share_parameters(self.teacher, self.student)
        else:
            source = DefaultModelLoader.Source(
                self.settings.student, revision=None, prefix="student."
            )
            self.secondary_weights = [source]
        self.expected: Sequence[Row] | None = None
        """Rows of the next `compute_logits`, where it is known what they are for."""
        self.mixed: Mixed | None = None
        """What is known of the rows of the last one, for whoever set `expected`."""
        self.forward_apart: Callable[[Tensor, Tensor], Tensor] | None = None
        """Stands in for the next `forward`, where the models see different tokens."""

    def embed_input_ids(self, input_ids: Int[Tensor, " tokens"]) -> Tensor:
        """The teacher's embeddings; vLLM asks for them, `forward` does not."""
        embedded: Tensor = self.teacher.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Int[Tensor, " tokens"],
        positions: Int[Tensor, " tokens"],
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "tokens hidden"]:
        """Both models over the same tokens, if nobody has set `forward_apart`."""
        apart, self.forward_apart = self.forward_apart, None
        if apart is not None:
            return apart(input_ids, positions)
        return torch.cat(
            [self.teacher(input_ids, positions), self.student(input_ids, positions)], -1
        )

    def compute_logits(
        self, hidden_states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows width"]:
        """T log q* of every row; see `mixing`."""
        rows, self.expected = self.expected, None
        if rows is not None and len(rows) != hidden_states.shape[0]:
            raise RuntimeError(f"{len(rows)} rows were announced and {hidden_states.shape[0]} came")
        split = self.hidden_sizes["teacher"]
        teacher = self.teacher.compute_logits(hidden_states[..., :split].contiguous())
        student = None
        if rows is None or any(row.options.mode == "mixture" for row in rows):
            student = self.student.compute_logits(hidden_states[..., split:].contiguous())
        log_q, mixed = mix(
            student, teacher, rows, self.default, self.settings.vocab_size, self.width
        )
        bad = mixed.bad.any(-1)
        if bad.any():
            log_q[bad] = -torch.inf
            log_q[bad, self.settings.end_id] = 0.0
        self.mixed = mixed if rows is not None else self.mixed
        return log_q

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The teacher's weights come first and unprefixed, then the student's."""
        named = (
            (name if name.startswith("student.") else f"teacher.{name}", weight)
            for name, weight in weights
        )
        loaded: set[str] = AutoWeightsLoader(self).load_weights(named)
        return loaded


def _share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the parameters of `source`, module by module, and drop its own."""
    modules = dict(source.named_modules())
    for name, module in target.named_modules():
        for key in list(module._parameters):
            module._parameters[key] = modules[name]._parameters[key]
