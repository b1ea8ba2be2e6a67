"""The byte engine passes the suite that every engine passes.

With one byte per token q of bytes is q of tokens, so the suite's enumeration holds for it.
"""

from dataclasses import replace

import pytest

from optimal_sampling.config import LocalOptions, MixtureConfig
from optimal_sampling.engines.bytes.engine import ByteEngine
from optimal_sampling.engines.local.engine import LoadedPair
from optimal_sampling.vocabulary import TokenBytes, Vocabulary
from tests.engines.conformance import EngineConformance, Harness
from tests.engines.local.conftest import CONTEXT, VOCAB, stock_logits, tiny_model

LETTERS = "abcdefghijk"


class LetterTokenizer:
    """Id n is the n-th letter; 0 ends a text."""

    def __call__(self, text, **options):
        return {"input_ids": [1 + LETTERS.index(letter) for letter in text]}


def letter_engine(pair):
    table = TokenBytes((None, *(letter.encode() for letter in LETTERS)), frozenset({0}))
    vocabulary = Vocabulary(
        size=VOCAB,
        stop_ids=frozenset({0}),
        student_tokenizer=LetterTokenizer(),
        student_context=CONTEXT,
        teacher_context=CONTEXT,
        bytes_by_role={"student": table, "teacher": table},
    )
    options = LocalOptions(kv_memory_gib=0.1)
    loaded = LoadedPair.of(pair, VOCAB, options)
    return ByteEngine(loaded, MixtureConfig(), options, vocabulary)


class TestByteEngine(EngineConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls):
        pair = {"student": tiny_model(1), "teacher": tiny_model(2, layers=3)}
        logits = {role: stock_logits(model) for role, model in pair.items()}
        engine = letter_engine(pair)
        return Harness(
            open=lambda mixture, batch_size: engine.view(
                mixture, options=replace(engine.options, batch_size=batch_size)
            ),
            logits=lambda role, ids: logits[role](ids),
            prompts=[([1, 2], [3]), ([4], [5, 1, 2]), ([2, 2, 2], [2])],
            context_length=CONTEXT,
            samples=1500,
        )
