"""Tiny models with random weights: real Transformers architectures that cost nothing."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
import transformers

from optimal_sampling.config import LocalOptions, MixtureConfig
from optimal_sampling.engines.local.engine import LoadedPair, LocalEngine
from optimal_sampling.vocabulary import Vocabulary

VOCAB, CONTEXT = 12, 96


def tiny_model(seed, layers=2, vocab=VOCAB, kind="Qwen3", scale=0.35, **changes):
    """A model whose logits spread enough for sampling to matter."""
    config = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 0,
        **changes,
    }
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**config)
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, scale)
    return model.requires_grad_(False)


def vocabulary(size=VOCAB, context=CONTEXT, stop_ids=frozenset({0})):
    return Vocabulary(
        size=size, stop_ids=stop_ids, student_context=context, teacher_context=context
    )


class WatchedEngine(LocalEngine):
    """Keeps the loop of the latest `generate` call in `loop`."""

    def _new_loop(self):
        self.loop = super()._new_loop()
        return self.loop


def engine_of(student, teacher, mixture=None, vocab=None, **options):
    """A local engine on models in memory. The same object twice: shared weights."""
    vocab = vocab or vocabulary()
    options = LocalOptions(**{"kv_memory_gib": 0.1, **options})
    pair = LoadedPair.of({"student": student, "teacher": teacher}, vocab.size, options)
    return WatchedEngine(pair, mixture or MixtureConfig(), options, vocab)


def with_options(engine, **options):
    """A view of the engine with other options."""
    return engine.view(options=replace(engine.options, **options))


def stock_logits(model, vocab=VOCAB, attention="eager"):
    """The model's own forward pass, cached: (token ids) -> float64 logits of the next token.

    `eager` computes attention's softmax in float32, `sdpa` in the model's own precision.
    """
    stock = copy.deepcopy(model)
    stock.set_attn_implementation(attention)

    @functools.cache
    def logits(ids):
        with torch.inference_mode():
            return stock(torch.tensor([ids])).logits[0, -1, :vocab].double().numpy()

    return lambda ids: logits(tuple(ids))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are faster so, and a test run has several processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
