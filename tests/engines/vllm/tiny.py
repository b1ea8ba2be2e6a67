"""Tiny random models on disk, an engine of two, and their float32 reference in Transformers."""

import functools
import os
from dataclasses import dataclass

import numpy as np
import torch
import transformers

from optimal_sampling.config import MixtureConfig, ModelConfig, VllmOptions
from optimal_sampling.vocabulary import Vocabulary

SECOND_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
"""Whether the tests of this run go to vLLM's second model runner."""

VOCAB, CONTEXT, STOP = 12, 96, frozenset({0})
PROMPTS = [
    ([1, 2, 3], [4]),
    ([5], [6, 7, 8, 9, 1, 2, 3, 4, 5]),
    ([2] * 17, [3] * 41),
    ([2] * 40, [3] * 7),
    ([7, 8], [7, 8]),
]
"""(student's, teacher's): the student's longer, shorter, much shorter, much longer, the same."""

MODELS = {
    "student": {"seed": 1, "layers": 1},
    "teacher": {"seed": 2, "layers": 3},
    "padded": {"seed": 3, "layers": 2, "vocab": 24},
    "llama": {"seed": 4, "layers": 2, "kind": "Llama"},
    "gpt2": {"seed": 5, "layers": 2, "kind": "GPT2"},
    "wide_teacher": {"seed": 6, "layers": 2, "vocab": 2048, "scale": 0.12},
    "wide_student": {"seed": 7, "layers": 1, "vocab": 2048, "scale": 0.12},
}


def tiny_model(seed, layers=2, vocab=VOCAB, kind="Qwen3", scale=0.25, **own):
    """A model with spread logits; its heads are as wide as vLLM's attention on a CPU needs.

    `own`: further fields of its config.
    """
    common = {
        "vocab_size": vocab,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    if kind == "GPT2":
        config = transformers.GPT2Config(
            n_embd=64, n_layer=layers, n_head=2, n_positions=CONTEXT, **common
        )
    else:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
        }
        sizes |= {
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096 if vocab > 99 else CONTEXT,
        }
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **common, **own})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, scale)
    return model.requires_grad_(False)


def save_all(root):
    """Folder of each of MODELS."""
    paths = {}
    for name, options in MODELS.items():
        paths[name] = str(root / name)
        tiny_model(**options).save_pretrained(paths[name])
    return paths


@functools.cache
def reference(folder):
    """(token ids) -> float64 logits of the next token, by Transformers in float32."""

    @functools.cache
    def logits(ids):
        with torch.inference_mode():
            return _model(folder)(torch.tensor([ids])).logits[0, -1].double().numpy()

    return lambda ids: logits(tuple(ids))


@functools.cache
def _model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def all_rows(folder, prompt, tokens):
    """Float64 logits before each token of a completion, in one forward pass. [tokens, vocab]"""
    with torch.inference_mode():
        logits = _model(folder)(torch.tensor([[*prompt, *tokens]])).logits[0]
    return logits[len(prompt) - 1 : -1].double().numpy()


@dataclass
class Pair:
    """What the harness and the tests need of two models."""

    student: str
    teacher: str
    size: int = VOCAB
    context: int = CONTEXT

    def logits(self, role, ids):
        return reference(getattr(self, role))(ids)[: self.size]

    @property
    def vocabulary(self):
        rows = {
            role: transformers.AutoConfig.from_pretrained(getattr(self, role)).vocab_size
            for role in ("student", "teacher")
        }
        return Vocabulary(
            size=self.size,
            stop_ids=STOP,
            student_context=self.context,
            teacher_context=self.context,
            student_rows=rows["student"],
            teacher_rows=rows["teacher"],
        )

    def open(self, draft_tokens=0, batch_size=256, mixture=None, mode="mixture", **settings):
        from optimal_sampling.engines.vllm.engine import VllmEngine

        return VllmEngine.load(
            ModelConfig(teacher=self.teacher, student=self.student),
            mixture or MixtureConfig(),
            VllmOptions(batch_size, kv_memory_gib=0.05, draft_tokens=draft_tokens),
            self.vocabulary,
            mode,
            settings={"enforce_eager": True, "block_size": 32, **settings},
        )


def log_softmax(x):
    x = np.asarray(x, dtype=np.float64)
    x = x - x.max()
    return x - np.log(np.exp(x).sum())
