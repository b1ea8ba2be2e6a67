"""Pairs of tiny models with different tokenizers."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from optimal_sampling.config import LocalOptions, MixtureConfig
from optimal_sampling.engines.bytes.engine import ByteEngine
from optimal_sampling.engines.local.engine import LoadedPair
from optimal_sampling.vocabulary import ModelTokens, Vocabulary
from optimal_sampling.vocabulary.token_bytes import byte_of_letter
from tests.engines.local.conftest import tiny_model

CONTEXT = 96
END = "<|end|>"
STUDENT_WORDS = ("ab", "abc", "bc", "12", "123", "ba", "\u0120a", "\u0120\u0120", "\u00c3\u00a9")
TEACHER_WORDS = ("ca", "bb", "aab", "23", "1234", "\u0120ab", "aa", "\u010a\u010a")
COMMON = "abc 123\n\u00e9".encode()
"""Bytes that the models write often."""


def small_tokenizer(words=(), end=END):
    """Byte-level BPE: 256 bytes, and words with all their merges."""
    vocab = dict(byte_of_letter())
    merges = []
    for word in words:
        for count in range(2, len(word) + 1):
            if word[:count] not in vocab:
                vocab[word[:count]] = len(vocab)
                merges.append((word[: count - 1], word[count - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)


def byte_vocabulary(student, teacher, context=CONTEXT):
    """Of two tokenizers."""
    tokens = [
        ModelTokens(name, each, frozenset({each.eos_token_id}), context=context)
        for name, each in (("student", student), ("teacher", teacher))
    ]
    return Vocabulary.of_bytes(*tokens)


def writing_model(seed, tokenizer, context=CONTEXT, **changes):
    """A random model that mostly writes the common bytes. Its logits have padded rows."""
    size = len(tokenizer)
    changes = {"max_position_embeddings": context, "tie_word_embeddings": False, **changes}
    model = tiny_model(seed, vocab=size + 3, **changes)
    head = torch.nn.Linear(model.lm_head.in_features, size + 3)
    head.weight.data.copy_(model.lm_head.weight.data)
    head.bias.data.fill_(0.0)
    rare = [byte for byte in range(256) if byte not in COMMON]
    head.bias.data[rare] = -9.0
    head.bias.data[size:] = 50.0
    head.bias.data[tokenizer.eos_token_id] = -0.5
    model.lm_head = head.requires_grad_(False)
    return model


@pytest.fixture(scope="session")
def tokenizers():
    return small_tokenizer(STUDENT_WORDS), small_tokenizer(TEACHER_WORDS)


@pytest.fixture(scope="session")
def pair_models(tokenizers):
    student, teacher = tokenizers
    return writing_model(1, student), writing_model(2, teacher, layers=3)


def byte_engine(models_of_pair, tokenizers, mixture=None, **options):
    """A byte engine on models in memory."""
    vocabulary = byte_vocabulary(*tokenizers)
    options = LocalOptions(**{"kv_memory_gib": 0.1, **options})
    named = dict(zip(("student", "teacher"), models_of_pair, strict=True))
    pair = LoadedPair.of(named, vocabulary.logit_rows, options)
    return ByteEngine(pair, mixture or MixtureConfig(), options, vocabulary)
