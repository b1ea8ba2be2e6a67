"""Models with random weights of known architectures: what they cost, without a download.

Sizes are those of the published configurations.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from optimal_sampling.bench.subcommands import ModelOptions, PairOptions, Uneven
from optimal_sampling.bench.workload import ModelPair, Workload
from optimal_sampling.config import LocalOptions, ModelConfig, PromptConfig
from optimal_sampling.engines.device import resolve_device, resolve_dtype
from optimal_sampling.engines.local.engine import LoadedPair
from optimal_sampling.errors import ConfigError
from optimal_sampling.types import Request
from optimal_sampling.vocabulary import Vocabulary

__all__ = ["ARCHITECTURES", "Architecture", "RandomPair", "architecture_named", "make_pair"]

LLAMA_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "original_max_position_embeddings": 8192,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


@dataclass(frozen=True)
class Architecture:
    """The sizes that decide what a forward pass costs."""

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
        """Name of the vocabulary: two architectures with the same one can be a pair."""
        return self.family.rstrip("0123456789.")

    def config(self) -> Any:
        """The Transformers configuration, without an end of text."""
        from transformers import AutoConfig

        llama = self.family == "llama"
        head_dim = {"head_dim": self.head_dim} if self.head_dim else {}
        return AutoConfig.for_model(
            self.family,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.mlp,
            vocab_size=self.vocab,
            max_position_embeddings=self.context,
            tie_word_embeddings=self.tied,
            rope_parameters=LLAMA_ROPE if llama else {"rope_type": "default", "rope_theta": 1e6},
            rms_norm_eps=1e-5 if llama else 1e-6,
            bos_token_id=None,
            eos_token_id=None,
            **head_dim,
        )

    def model(self, models: ModelConfig, seed: int) -> Any:
        """A model with random weights, made on its device.

        They have the architecture's own initial spread, so activations are finite. The
        global random state is left as it was.
        """
        from transformers import AutoModelForCausalLM

        device = resolve_device(models.device)
        dtype = resolve_dtype(models.dtype, device)
        forked = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(forked), torch.device(device):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=dtype)
        return model.eval().requires_grad_(False)


QWEN_VOCAB, QWEN_7B_VOCAB, LLAMA_VOCAB = 151_936, 152_064, 128_256

ARCHITECTURES = {
    "tiny": Architecture("qwen3", 64, 2, 4, 2, 128, 512, 4096, head_dim=16),
    "tiny-hybrid": Architecture("qwen3_5_text", 64, 4, 4, 2, 128, 512, 4096, head_dim=16),
    "Qwen2.5-0.5B": Architecture("qwen2", 896, 24, 14, 2, 4864, QWEN_VOCAB, 32_768),
    "Qwen2.5-1.5B": Architecture("qwen2", 1536, 28, 12, 2, 8960, QWEN_VOCAB, 32_768),
    "Qwen2.5-3B": Architecture("qwen2", 2048, 36, 16, 2, 11_008, QWEN_VOCAB, 32_768),
    "Qwen2.5-7B": Architecture("qwen2", 3584, 28, 28, 4, 18_944, QWEN_7B_VOCAB, 32_768, tied=False),
    "Qwen3-0.6B": Architecture("qwen3", 1024, 28, 16, 8, 3072, QWEN_VOCAB, 40_960, head_dim=128),
    "Qwen3-1.7B": Architecture("qwen3", 2048, 28, 16, 8, 6144, QWEN_VOCAB, 40_960, head_dim=128),
    "Qwen3-4B": Architecture("qwen3", 2560, 36, 32, 8, 9728, QWEN_VOCAB, 40_960, head_dim=128),
    "Qwen3-8B": Architecture(
        "qwen3", 4096, 36, 32, 8, 12_288, QWEN_VOCAB, 40_960, tied=False, head_dim=128
    ),
    "Llama-3.2-1B": Architecture("llama", 2048, 16, 32, 8, 8192, LLAMA_VOCAB, 131_072, head_dim=64),
    "Llama-3.2-3B": Architecture(
        "llama", 3072, 28, 24, 8, 8192, LLAMA_VOCAB, 131_072, head_dim=128
    ),
}


def architecture_named(name: str) -> Architecture:
    """The architecture of this name. Raises ConfigError where it is unknown."""
    if name not in ARCHITECTURES:
        raise ConfigError(f"unknown shape {name!r}; the shapes are: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


class RandomPair(ModelPair):
    """Two architectures instead of two models: prompts of random ids, texts of given lengths."""

    natural = False
    uneven: Uneven = "nothing"
    """What is of random length, from an eighth of the given one to all of it."""

    def __init__(
        self,
        models: ModelConfig,
        teacher: str,
        student: str,
        *,
        same_weights: bool = False,
        prompt_tokens: int = 128,
    ) -> None:
        self.names_by_role = {"teacher": teacher, "student": student}
        self.same_weights = same_weights
        self.prompt_tokens = prompt_tokens
        super().__init__(models, _shared_vocabulary(teacher, student))

    @property
    def names(self) -> dict[str, Any]:
        """The models, for the line of JSON."""
        names: dict[str, Any] = {}
        for role, name in self.names_by_role.items():
            names[role] = f"{name} shape, random weights"
        names["same_weights"] = self.same_weights
        names["dtype"] = self.models.dtype
        if self.acceptance is not None:
            names["emulated_acceptance"] = self.acceptance
        return names

    def twin(self) -> RandomPair:
        """The loaded teacher as its own student, without a copy of it."""
        twin = copy.copy(self)
        twin.same_weights = True
        twin._engines = {}
        for key, engine in self._engines.items():
            pair = engine.pair
            for runner in pair.runners.values():
                # the student's caches would stay, but the twin counts on all of the memory
                runner.drop_caches()
            runners = dict.fromkeys(pair.runners, pair.runners["teacher"])
            twin._engines[key] = engine.view()
            twin._engines[key].pair = replace(pair, runners=runners, shared=True)
        return twin

    def workload(
        self, count: int, tokens: int | None = None, prompt: PromptConfig | None = None
    ) -> Workload:
        """Prompts of random ids, the same for both models; `tokens` unset: `equal_tokens` each."""
        generator = torch.Generator().manual_seed(0)
        shape = count, self.prompt_tokens
        rows = torch.randint(self.vocabulary.size, shape, generator=generator).tolist()
        most = tokens or self.equal_tokens
        prompts = _lengths(count, self.prompt_tokens, self.uneven != "nothing", generator)
        texts = _lengths(count, most, self.uneven == "all", generator)
        requests = []
        for index, (row, length, text) in enumerate(zip(rows, prompts, texts, strict=True)):
            ids = tuple(row[:length])
            requests.append(Request(f"shape-{index}", index, 0, ids, ids, text))
        return Workload(tuple(requests), natural_end=False)

    def _load(self, options: LocalOptions) -> LoadedPair:
        teacher = self._load_stock("teacher")
        student = teacher if self.same_weights else self._load_stock("student")
        models = {"teacher": teacher, "student": student}
        return LoadedPair.of(models, self.vocabulary.size, options)

    def _load_stock(self, role: str) -> Any:
        seed = 0 if self.same_weights or role == "teacher" else 1
        return architecture_named(self.names_by_role[role]).model(self.models, seed)


def _lengths(count: int, most: int, uneven: bool, generator: torch.Generator) -> list[int]:
    if not uneven:
        return [most] * count
    shortest = max(1, most // 8)
    return torch.randint(shortest, most + 1, (count,), generator=generator).tolist()


def _shared_vocabulary(teacher: str, student: str) -> Vocabulary:
    """The ids that both have. Raises ConfigError for architectures of different vocabularies."""
    one, other = architecture_named(teacher), architecture_named(student)
    if one.tokenizer != other.tokenizer:
        raise ConfigError(
            f"{teacher} and {student} have different vocabularies; take two shapes of one family"
        )
    return Vocabulary(
        min(one.vocab, other.vocab),
        frozenset(),
        teacher_context=one.context,
        student_context=other.context,
    )


def make_pair(options: ModelOptions) -> ModelPair:
    """The models or shapes that the options name; weights are loaded at the first use.

    Options without `student_shape` name one model for both roles. Raises ConfigError, ModelError.
    """
    models, teacher = options.models, options.teacher_shape
    if teacher is None:
        one = not isinstance(options, PairOptions)
        return ModelPair(replace(models, student=models.teacher) if one else models)
    student = getattr(options, "student_shape", teacher)
    same = getattr(options, "same_weights", True)
    tokens = options.prompt_tokens
    pair = RandomPair(models, teacher, student, same_weights=same, prompt_tokens=tokens)
    pair.equal_tokens = getattr(options, "new_tokens", pair.equal_tokens)
    pair.uneven = getattr(options, "uneven", pair.uneven)
    if not same:
        pair.acceptance = getattr(options, "acceptance", None)
    return pair
