"""The engine at tolerance 0 against the sum over all sequences of tokens, by plain forward passes.

Nothing here is shared with the package: the probability of every prefix is summed over the
sequences that write it, and alpha is found by bisection.
"""

import copy
import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from optimal_sampling.config import MixtureConfig
from optimal_sampling.types import Request
from tests.engines.bytes.conftest import byte_engine, small_tokenizer, writing_model

LETTERS = "abc"
PROMPTS = {"student": (97, 98), "teacher": (99,)}


class Enumerated:
    """The law of the next letter and of the end, of a model over LETTERS after its prompt."""

    def __init__(self, model, tokenizer, prompt):
        self.model, self.prompt, self.end = model, prompt, tokenizer.eos_token_id
        self.size = len(tokenizer)
        known = tokenizer.get_vocab().items()
        self.words = {i: word for word, i in known if set(word) <= set(LETTERS)}
        self.next = functools.cache(self._next)
        self.writing = functools.cache(self._writing)

    def _next(self, context):
        """Probability of every token after a context."""
        with torch.no_grad():
            logits = self.model(torch.tensor([[*self.prompt, *context]])).logits
        return logits[0, -1, : self.size].softmax(0).numpy()

    def _writing(self, text):
        """All contexts that write a text, with their probabilities."""
        if not text:
            return [((), 1.0)]
        return [
            ((*context, i), p * self.next(context)[i])
            for i, word in self.words.items()
            if text.endswith(word)
            for context, p in self.writing(text[: len(text) - len(word)])
        ]

    def prefix(self, text):
        """Probability that the text begins so: the last token may write more."""
        if not text:
            return 1.0
        return sum(
            p * self.next(context)[i]
            for count in range(len(text))
            for context, p in self.writing(text[:count])
            for i, word in self.words.items()
            if word.startswith(text[count:])
        )

    def law(self, text):
        ends = sum(p * self.next(context)[self.end] for context, p in self.writing(text))
        found = [*(self.prefix(text + letter) for letter in LETTERS), ends]
        return np.array(found) / self.prefix(text)


def symmetric(student, teacher):
    """alpha, and q with equal KL to both."""
    low, high = 0.0, 1.0
    for _ in range(100):
        alpha = (low + high) / 2
        q = student ** (1 - alpha) * teacher**alpha
        q /= q.sum()
        gap = (q * np.log(teacher / student)).sum()
        low, high = (alpha, high) if gap < 0 else (low, alpha)
    return alpha, q


@pytest.fixture(scope="module")
def case():
    """An engine over LETTERS, and each model enumerated."""
    words = ("ab", "abc", "bc", "ba", "aa"), ("ca", "bb", "aab", "cab")
    tokenizers = [small_tokenizer(each) for each in words]
    models = [writing_model(seed, each).double() for seed, each in enumerate(tokenizers, 1)]
    for model, tokenizer in zip(models, tokenizers, strict=True):
        bias = model.lm_head.bias.data
        bias[[byte for byte in range(256) if chr(byte) not in LETTERS]] = -80.0
        bias[tokenizer.eos_token_id] = 2.0
    plain = [copy.deepcopy(model) for model in models]
    for model in plain:
        model.set_attn_implementation("sdpa")
    exact = [
        Enumerated(model, tokenizer, PROMPTS[role])
        for model, tokenizer, role in zip(plain, tokenizers, PROMPTS, strict=True)
    ]
    free = MixtureConfig(alpha_min=0.0)
    return byte_engine(models, tokenizers, free, byte_tolerance=0.0), exact


@pytest.mark.parametrize("drafts", [0, 3])
def test_every_byte_has_the_law_of_the_enumeration(case, drafts):
    """Guards: sequences of tokens left out or counted twice anywhere between the models' logits and
    the trace: in the cache, in a draft, in the end of a text.
    """
    engine, exact = case
    view = engine.view(options=replace(engine.options, draft_tokens=drafts))
    many = [Request("p", i, 3, PROMPTS["student"], PROMPTS["teacher"], 4) for i in range(10)]
    checked = ends = 0
    for c in view.generate(many):
        text, trace = c.byte_level.text, c.byte_level.trace
        assert set(c.byte_level.lost.values()) == {0}
        for place in range(min(len(trace), 6)):
            student, teacher = (each.law(text[:place]) for each in exact)
            assert student.sum() == pytest.approx(1, abs=1e-12)
            alpha, q = symmetric(student, teacher)
            symbol = LETTERS.index(text[place]) if place < len(text) else len(LETTERS)
            expected = {
                "log_p_student": math.log(student[symbol]),
                "log_p_teacher": math.log(teacher[symbol]),
                "kl_student": (q * np.log(q / student)).sum(),
                "kl_teacher": (q * np.log(q / teacher)).sum(),
                "ess_student": 1 / (q * q / student).sum(),
            }
            found = {name: trace[name][place] for name in expected}
            assert found == pytest.approx(expected, abs=1e-5)
            assert trace["alpha"][place] == pytest.approx(alpha, abs=1e-4)
            checked += 1
            ends += symbol == len(LETTERS)
    assert checked > 30
    assert ends > 2
