"""Byte views and the engine over real vocabularies: GPT-2's, Whisper's and a SentencePiece model's.

The models are random or made up; the tokenizers and the texts are real.
"""

import json
from functools import cache

import numpy as np
import pytest
import torch

from optimal_sampling.config import LocalOptions, MixtureConfig
from optimal_sampling.engines.bytes.byte_view import ByteView, TokenLaw
from optimal_sampling.engines.bytes.engine import ByteEngine
from optimal_sampling.engines.bytes.laws import LawReader
from optimal_sampling.engines.bytes.trie import ByteTrie
from optimal_sampling.engines.local.engine import LoadedPair
from optimal_sampling.types import Request
from optimal_sampling.vocabulary import ModelTokens, TokenBytes, Vocabulary, continued_ids
from optimal_sampling.vocabulary.token_bytes import token_bytes
from tests.engines.local.conftest import tiny_model
from tests.vocabulary.real_tokenizers import FOLDER, NAMES, SHARED, real_tokenizer
from tests.vocabulary.test_token_bytes import TEXTS

pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="no ../shared/data/tokenizers beside the checkout"
)
PAIRS = (("gpt2", "mistral"), ("mistral", "whisper"), ("whisper", "gpt2"))
SURE = 0.99


@cache
def vocabulary_of(name):
    """Bytes, trie, and the rank of every id."""
    tokenizer = real_tokenizer(name)
    table = token_bytes(tokenizer, {tokenizer.eos_token_id})
    trie = ByteTrie(table.of_id)
    return table, trie, {int(index): rank for rank, index in enumerate(trie.ids)}


class CanonicalModel:
    """Gives the next token of one text's canonical tokens SURE, and all tokens a little."""

    def __init__(self, name, text):
        table, self.trie, self.rank = vocabulary_of(name)
        self.ids = tuple(continued_ids(real_tokenizer(name), table, text))

    def law(self, context):
        count = len(self.trie.ids)
        known = context == self.ids[: len(context)]
        little = (1 - SURE if known else 1.0) / (count + 1)
        log_p = np.full(count, np.log(little))
        sums = little * np.arange(count + 1)
        ends = known and context == self.ids
        if known and not ends:
            rank = self.rank[self.ids[len(context)]]
            log_p[rank] = np.log(little + SURE)
            sums[rank + 1 :] += SURE
        return TokenLaw(log_p, sums, little + SURE * ends)


def real_texts():
    texts = [*TEXTS, *(SHARED / "multilingual.txt").read_text().splitlines()[:8]]
    for file in ("gsm8k_train.jsonl", "math500.jsonl"):
        lines = (SHARED / file).read_text().splitlines()[:2]
        texts += [json.loads(line)["solution"] for line in lines]
    return texts


@pytest.mark.parametrize("name", NAMES)
def test_a_view_reads_real_text_at_one_evaluation_per_token(name):
    """Guards: a token whose bytes are not those of its piece, evaluations within a token, a text
    that ends before the end token has its mass.
    """
    for text in real_texts():
        model = CanonicalModel(name, text)
        view = ByteView(model.trie, 0.01)
        written = text.encode()
        for byte in [*written, None]:
            while view.wanted:
                view.receive(model.law(view.wanted[-1].context))
            if byte is not None:
                view.push(byte)
        assert view.closed.context == model.ids
        assert view.evaluations <= 1.2 * len(model.ids) + 2
        assert view.law()[256] > 0.9
        assert view.log_prefix >= len(model.ids) * np.log(SURE) - 1e-9


def test_the_end_has_the_mass_of_all_end_tokens():
    """Guards: one of two end tokens, control tokens that keep their mass, padded rows counted."""
    table = TokenBytes((b"a", None, b"b", None, None), frozenset({1, 3}))
    logits = torch.tensor([[0.3, 1.0, -0.5, 0.1, 9.0, 50.0]])
    reader = LawReader(table, ByteTrie(table.of_id), MixtureConfig(temperature=0.5), "student")
    [law] = reader.read(logits, [()])
    p = torch.tensor([0.3, 1.0, -0.5, 0.1]).double().div(0.5).softmax(0)
    assert law.end == pytest.approx(float(p[1] + p[3]), abs=1e-7)
    assert law.end_id == 1
    assert np.exp(law.log_p).tolist() == pytest.approx([float(p[0]), float(p[2])], abs=1e-7)


def test_tokens_that_break_a_character_have_no_mass():
    """Guards: a token whose later bytes are no UTF-8, which takes the mass of those that go on; an
    end within a character; a law that is NaN where no token can follow.
    """
    words = (b"a", b"\xe2", b"\x82", b"\x82\xac", b"\x82\xac\xac", b"\xac", b"\xe2\x82a", None)
    table = TokenBytes(words, frozenset({7}))
    trie = ByteTrie(words)
    reader = LawReader(table, trie, MixtureConfig(), "student")
    contexts = [(), (0, 1), (1, 2), (1, 3), (0, 1, 2)]
    logits = torch.arange(8.0).repeat(5, 1)
    laws = reader.read(logits, contexts)
    allowed = [{0, 1, 7}, {2, 3, 5}, {2, 5}, {0, 1, 7}, {2, 5}]
    for law, ids in zip(laws, allowed, strict=True):
        p = torch.where(torch.tensor([i in ids for i in range(8)]), logits[0].double(), -torch.inf)
        p = p.softmax(0).tolist()
        assert law.end == pytest.approx(p[7], abs=1e-12)
        assert np.exp(law.log_p).tolist() == pytest.approx([p[i] for i in trie.ids], abs=1e-12)
    cut = TokenBytes((b"a", b"\xe2", None), frozenset({2}))
    [law] = LawReader(cut, ByteTrie(cut.of_id), MixtureConfig(), "student").read(logits[:1], [(1,)])
    assert (law.end, law.sums.tolist()) == (0, [0, 0, 0])


def random_engine(names, scale):
    tokenizers = [real_tokenizer(name) for name in names]
    models = [
        tiny_model(seed, layers=1, vocab=len(tokenizer) + 7, scale=scale)
        for seed, tokenizer in enumerate(tokenizers)
    ]
    tokens = [
        ModelTokens(name, each, frozenset({each.eos_token_id}), context=96)
        for name, each in zip(names, tokenizers, strict=True)
    ]
    vocabulary = Vocabulary.of_bytes(*tokens)
    options = LocalOptions(kv_memory_gib=0.1, batch_size=64)
    named = dict(zip(("student", "teacher"), models, strict=True))
    pair = LoadedPair.of(named, vocabulary.logit_rows, options)
    mixture = MixtureConfig(alpha_method="fixed")  # the cheapest
    return ByteEngine(pair, mixture, options, vocabulary)


def check_completions(names, numbers):
    """Texts are UTF-8, and the ids are those of the student's tokenizer for them."""
    engine = random_engine(names, scale=0.5)
    student = engine.vocabulary.bytes_by_role["student"]
    reasons = set()
    many = [Request("p", i, 0, (i % 300 + 300,), (i % 200 + 900, 1000), 6) for i in numbers]
    for c in engine.generate(many):
        text = c.byte_level.text
        assert text.encode().decode() == text
        ids = [index for index in c.token_ids if index not in engine.stop_ids]
        assert student.join(ids) == text.encode()
        if c.byte_level.canonical:
            assert ids == continued_ids(engine.vocabulary.student_tokenizer, student, text)
        assert len(c.trace) == len(c.token_ids) <= 6
        reasons.add(c.finish_reason)
    assert reasons <= {"stop", "length"}


def test_random_models_write_valid_text():
    """Guards: bytes of half a character at the end, ids that write something else than the text,
    hypotheses given up for one that no valid text goes on from.

    Random models write any bytes, so nearly every completion begins or ends within a character.
    """
    check_completions(PAIRS[0], [*range(8), 48, 441, 536, 744])


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 3400, 850))
@pytest.mark.parametrize("names", PAIRS)
def test_ten_thousand_completions(names, first):
    """As above, of many more texts, in pieces of a minute."""
    check_completions(names, range(first, first + 850))
