"""The model class that vLLM runs: teacher and student side by side, log q* as logits.

The worker says before each forward pass which request and options each row of logits is for. Other
rows get the engine's own mixture at temperature 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix

from optimal_sampling.config import MixtureConfig
from optimal_sampling.engines.vllm.mixing import LogitsRow, Mixed, mix
from optimal_sampling.engines.vllm.plugin import check_version
from optimal_sampling.engines.vllm.request_options import OPTIONS
from optimal_sampling.engines.vllm.role_configs import check_windows, student_config, teacher_config
from optimal_sampling.engines.vllm.tensor_parallel import initialize_student
from optimal_sampling.engines.vllm.weight_check import WeightCheck
from optimal_sampling.errors import ModelError
from optimal_sampling.types import Mode

__all__ = ["CompositeSettings", "OptimalSamplingForCausalLM"]


@dataclass(frozen=True)
class CompositeSettings:
    """Settings of the pair, from the model's config under the key `OPTIONS`."""

    teacher_architectures: list[str]
    student: str
    """Folder or hub id of the student."""
    vocab_size: int
    """Number of shared token ids; no id beyond them is drawn."""
    mixture: dict[str, Any]
    """Fields of the default MixtureConfig."""
    shared: bool = False
    """Whether both models have the same weights."""
    end_id: int = 0
    """A shared stop id; ends a completion whose logits cannot be drawn from."""
    trust_remote_code: bool = False
    check_models: str = "auto"
    """Whether to compare both models with Transformers; see VllmOptions."""


class OptimalSamplingForCausalLM(nn.Module):
    """Teacher and student. Hidden states: [tokens, teacher's hidden size + student's]."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check_version()
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.settings = CompositeSettings(**getattr(config, OPTIONS))
        self.default = MixtureConfig(**self.settings.mixture)
        self.width: int = vllm_config.model_config.get_vocab_size()
        teacher = teacher_config(vllm_config, self.settings.teacher_architectures)
        student = teacher
        if not self.settings.shared:
            student = student_config(
                vllm_config, self.settings.student, self.settings.trust_remote_code
            )
        self.role_configs = {"teacher": teacher.model_config, "student": student.model_config}
        self.teacher = initialize_model(teacher, prefix=maybe_prefix(prefix, "teacher"))
        with set_model_tag("student"):  # keeps its compiled graphs apart from the teacher's
            self.student = initialize_student(student, maybe_prefix(prefix, "student"))
        self.hidden_sizes = {
            role: config.get_hidden_size() for role, config in self.role_configs.items()
        }
        for role, config in self.role_configs.items():
            check_windows(role, getattr(self, role), config.hf_text_config)
        if self.settings.shared:
            _share_modules(self.teacher, self.student)
        else:
            source = DefaultModelLoader.Source(
                self.settings.student, revision=None, prefix="student."
            )
            self.secondary_weights = [source]
        self.expected: Sequence[LogitsRow] | None = None
        """Rows of the next `compute_logits`; None: rows that belong to no request's next token."""
        self.mixed: Mixed | None = None
        """Values of the rows of the last `compute_logits` that had `expected` rows."""
        self.separate_forward: Callable[[Tensor, Tensor], Tensor] | None = None
        """Replaces the next `forward`, where the models run different tokens."""

    def embed_input_ids(self, input_ids: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens hidden"]:
        """The teacher's embeddings. vLLM's interface asks for them; `forward` takes ids."""
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
        """Hidden states of both models over the same tokens, or those of `separate_forward`."""
        separate_forward, self.separate_forward = self.separate_forward, None
        if separate_forward is not None:
            return separate_forward(input_ids, positions)
        hidden = [self.teacher(input_ids, positions), self.student(input_ids, positions)]
        return torch.cat(hidden, -1)

    def compute_logits(
        self, hidden_states: Float[Tensor, "rows hidden"]
    ) -> Float[Tensor, "rows width"]:
        """T log q* of every row, T its temperature: vLLM divides logits by it."""
        rows, self.expected = self.expected, None
        if rows is not None and len(rows) != hidden_states.shape[0]:
            raise RuntimeError(
                f"{len(rows)} rows of logits were scheduled and {hidden_states.shape[0]} computed"
            )
        split = self.hidden_sizes["teacher"]
        teacher = self.teacher.compute_logits(hidden_states[..., :split].contiguous())
        student = None
        if rows is None or any(self.needs_student(row.options.mode) for row in rows):
            student = self.student.compute_logits(hidden_states[..., split:].contiguous())
        log_q, mixed = mix(
            student, teacher, rows, self.default, self.settings.vocab_size, self.width
        )
        bad = mixed.bad.any(-1)
        if bad.any():
            log_q[bad] = -torch.inf
            log_q[bad, self.settings.end_id] = 0.0
        if rows is not None:
            self.mixed = mixed
        return log_q

    def needs_student(self, mode: Mode) -> bool:
        """Whether a request runs the student's layers; of two equal models one is enough."""
        return mode == "mixture" or (mode == "student" and not self.settings.shared)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the teacher's weights, which come first and without a prefix, and the student's."""
        named = (
            (name if name.startswith("student.") else f"teacher.{name}", weight)
            for name, weight in weights
        )
        roles = ["teacher"] if self.settings.shared else ["teacher", "student"]
        check = WeightCheck({role: getattr(self, role) for role in roles}, self.role_configs)
        try:
            loaded: set[str] = AutoWeightsLoader(self).load_weights(check.watch(named))
        except (KeyError, ValueError, AssertionError, RuntimeError) as error:
            raise ModelError(f"vLLM has no place for a weight of the models: {error}") from error
        check.finish()
        for role, config in self.role_configs.items():
            maybe_retie_word_embeddings(getattr(self, role), config)
        return loaded


def _share_modules(source: nn.Module, target: nn.Module) -> None:
    """Replace the parts of `target` by those of `source`, but for its attention layers.

    Modules, not parameters: quantised weights are repacked after loading, which happens once per
    module. Attention layers have no weights, and a KV cache each.
    """
    target._parameters.update(source._parameters)
    for name, child in list(target.named_children()):
        if isinstance(child, AttentionLayerBase):
            continue
        if any(isinstance(each, AttentionLayerBase) for each in child.modules()):
            _share_modules(getattr(source, name), child)
        else:
            setattr(target, name, getattr(source, name))
