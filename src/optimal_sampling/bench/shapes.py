"""Random weights of known architectures: what a pair costs, without downloading it. No text comes out of them.

Sizes are those of the published configurations; `tests/bench` counts their parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from optimal_sampling.bench.watch import MeasuringEngine
from optimal_sampling.bench.workload import Bench, Workload
from optimal_sampling.config import LocalOptions, MixtureConfig, ModelConfig, PromptConfig
from optimal_sampling.engines.device import resolve_device, resolve_dtype
from optimal_sampling.engines.local.engine import LoadedPair
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Request
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["SHAPES", "Shape", "ShapeBench", "shape_named"]


@dataclass(frozen=True)
class Shape:
    """An architecture: the sizes that decide what a forward pass costs."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    context: int
    tied: bool = True
    """The output layer is the embedding."""
    head_dim: int | None = None
    """None: hidden / heads."""

    @property
    def tokenizer(self) -> str:
        """Shapes with the same one can be a pair."""
        return self.family.rstrip("0123456789.")

    def config(self) -> Any:
        """The Transformers configuration, without an end of text."""
        import transformers

        kinds = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "llama": "LlamaConfig"}
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
        if self.family == "llama":
            scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            rope = {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "original_max_position_embeddings": 8192,
                **scaling,
            }
        sizes: dict[str, Any] = {"head_dim": self.head_dim} if self.head_dim else {}
        return getattr(transformers, kinds[self.family])(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.mlp,
            vocab_size=self.vocab,
            max_position_embeddings=self.context,
            tie_word_embeddings=self.tied,
            rope_parameters=rope,
            rms_norm_eps=1e-5 if self.family == "llama" else 1e-6,
            bos_token_id=None,
            eos_token_id=None,
            **sizes,
        )

    def model(self, models: ModelConfig, seed: int) -> Any:
        """Random weights, made where they are used. Their spread is the architecture's own, so activations are finite.

        The global random state is left as it was.
        """
        from transformers import AutoModelForCausalLM

        device = resolve_device(models.device)
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(forked), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                self.config(), dtype=resolve_dtype(models.dtype, device)
            )
        return model.eval().requires_grad_(False)


QWEN_ROWS, QWEN_7B_ROWS, LLAMA_ROWS = 151_936, 152_064, 128_256

SHAPES = {
    "tiny": Shape("qwen3", 64, 2, 4, 2, 128, 512, 4096, head_dim=16),
    "Qwen2.5-0.5B": Shape("qwen2", 896, 24, 14, 2, 4864, QWEN_ROWS, 32_768),
    "Qwen2.5-1.5B": Shape("qwen2", 1536, 28, 12, 2, 8960, QWEN_ROWS, 32_768),
    "Qwen2.5-3B": Shape("qwen2", 2048, 36, 16, 2, 11_008, QWEN_ROWS, 32_768),
    "Qwen2.5-7B": Shape("qwen2", 3584, 28, 28, 4, 18_944, QWEN_7B_ROWS, 32_768, tied=False),
    "Qwen3-0.6B": Shape("qwen3", 1024, 28, 16, 8, 3072, QWEN_ROWS, 40_960, head_dim=128),
    "Qwen3-1.7B": Shape("qwen3", 2048, 28, 16, 8, 6144, QWEN_ROWS, 40_960, head_dim=128),
    "Qwen3-4B": Shape("qwen3", 2560, 36, 32, 8, 9728, QWEN_ROWS, 40_960, head_dim=128),
    "Qwen3-8B": Shape(
        "qwen3", 4096, 36, 32, 8, 12_288, QWEN_ROWS, 40_960, tied=False, head_dim=128
    ),
    "Llama-3.2-1B": Shape("llama", 2048, 16, 32, 8, 8192, LLAMA_ROWS, 131_072, head_dim=64),
    "Llama-3.2-3B": Shape("llama", 3072, 28, 24, 8, 8192, LLAMA_ROWS, 131_072, head_dim=128),
}


def shape_named(name: str) -> Shape:
    """Raises ConfigError where it is unknown."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; the shapes are: {', '.join(SHAPES)}")
    return SHAPES[name]


class ShapeBench(Bench):
    """Two shapes instead of two models: prompts of random ids, texts of equal length, emulated acceptance."""

    natural = False
    has_assistant = False

    def __init__(
        self,
        models: ModelConfig,
        teacher: str,
        student: str,
        *,
        same_weights: bool = False,
        acceptance: float | None = 0.9,
        prompt_tokens: int = 128,
        new_tokens: int = 48,
    ) -> None:
        self.shapes = {"teacher": shape_named(teacher), "student": shape_named(student)}
        if self.shapes["teacher"].tokenizer != self.shapes["student"].tokenizer:
            raise ConfigError(
                f"{teacher} and {student} have different vocabularies; take two shapes of one family"
            )
        self.shared = same_weights
        self.prompt_tokens = prompt_tokens
        self.equal_tokens = new_tokens
        super().__init__(models, self._vocabulary())
        self.acceptance = acceptance
        self._shape_names = {"teacher": teacher, "student": student}

    @property
    def names(self) -> dict[str, Any]:
        """What was measured, for the line of JSON."""
        found = {role: f"{name} shape, random weights" for role, name in self._shape_names.items()}
        rate = {} if self.acceptance is None else {"emulated_acceptance": self.acceptance}
        return {**found, "same_weights": self.shared, "dtype": self.models.dtype, **rate}

    def twin(self) -> ShapeBench:
        """The teacher's shape as its own student. An engine that was loaded already is used again."""
        name = self._shape_names["teacher"]
        found = ShapeBench(
            self.models,
            name,
            name,
            same_weights=True,
            acceptance=None,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.equal_tokens,
        )
        for key, engine in self._engines.items():
            for runner in engine.pair.runners.values():
                runner.drop_caches()  # the student's would stay; the twin counts on all the memory
            runners = dict.fromkeys(engine.pair.runners, engine.pair.runners["teacher"])
            pair = replace(engine.pair, runners=runners, shared=True)
            found._engines[key] = MeasuringEngine(
                pair, engine.mixture, engine.options, found.vocabulary
            )
        return found

    def workload(
        self, count: int, tokens: int | None = None, prompt: PromptConfig | None = None
    ) -> Workload:
        """Prompts of random ids, the same to both models; completions of `tokens` (unset: `equal_tokens`) each."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(
            self.vocabulary.size, (count, self.prompt_tokens), generator=generator
        ).tolist()
        most = tokens or self.equal_tokens
        requests = [
            Request(f"shape-{i}", i, 0, tuple(row), tuple(row), most) for i, row in enumerate(ids)
        ]
        return Workload(tuple(requests), natural_end=False)

    def _vocabulary(self) -> Vocabulary:
        teacher, student = self.shapes["teacher"], self.shapes["student"]
        size = min(teacher.vocab, student.vocab)
        return Vocabulary(
            size, frozenset(), student_context=student.context, teacher_context=teacher.context
        )

    def _load(self, batch_invariant: bool) -> MeasuringEngine:
        teacher = self._random("teacher")
        models = {
            "teacher": teacher,
            "student": teacher if self.shared else self._random("student"),
        }
        options = LocalOptions(batch_invariant=batch_invariant)
        pair = LoadedPair.of(models, self.vocabulary.size, options)
        return MeasuringEngine(pair, MixtureConfig(), options, self.vocabulary)

    def _load_stock(self, role: str) -> Any:
        return self._random(role)

    def _random(self, role: str) -> Any:
        seed = 0 if self.shared or role == "teacher" else 1
        return self.shapes[role].model(self.models, seed)
