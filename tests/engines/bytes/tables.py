"""Two models of tokens over three letters as random tables, and their laws of texts by
enumerating all sequences of tokens.
"""

import functools
import hashlib

import numpy as np

from optimal_sampling.engines.bytes.byte_view import END, SYMBOLS, ByteView, TokenLaw
from optimal_sampling.engines.bytes.trie import ByteTrie

LETTERS = b"abc"
STUDENT = (b"a", b"b", b"c", b"ab", b"bc", b"abc", b"a", None)
"""Two ids write `a`, as a letter and its byte piece do."""
TEACHER = (b"a", b"b", b"c", b"ca", b"bb", b"aab", b"bca", None)


class TableModel:
    """A random law of the next token for every context of tokens; texts have `longest` bytes.

    The last id ends the text.
    """

    def __init__(self, tokens, seed, longest=5):
        self.tokens, self.seed, self.longest = tokens, seed, longest
        self.trie = ByteTrie(tokens)
        self.log_p = functools.cache(self._log_p)

    def _log_p(self, context):
        name = repr((self.seed, context)).encode()
        seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
        logits = np.random.default_rng(seed).normal(size=len(self.tokens)) * 1.5
        used = sum(len(self.tokens[i]) for i in context)
        for i, token in enumerate(self.tokens[:-1]):
            if used + len(token) > self.longest:
                logits[i] = -np.inf
        return logits - np.log(np.exp(logits).sum())

    def law(self, context):
        log_p = self.log_p(context)
        ranked = log_p[self.trie.ids]
        sums = np.concatenate([[0.0], np.cumsum(np.exp(ranked))])
        return TokenLaw(ranked, sums, float(np.exp(log_p[-1])), len(log_p) - 1)

    def texts(self):
        """Probability of every text."""
        found = {}

        def walk(context, text, log_weight):
            log_p = self.log_p(context)
            found[text] = found.get(text, 0.0) + np.exp(log_weight + log_p[-1])
            for i, token in enumerate(self.tokens[:-1]):
                if np.isfinite(log_p[i]):
                    walk((*context, i), text + token, log_weight + log_p[i])

        walk((), b"", 0.0)
        return found

    def view(self, text=b"", tolerance=0.0):
        view = ByteView(self.trie, tolerance)
        self.settle(view)
        for byte in text:
            view.push(byte)
            self.settle(view)
        return view

    def settle(self, view):
        while view.wanted:
            view.receive(self.law(view.wanted[-1].context))


def prefixes(texts):
    """Probability that a text begins with each string."""
    found = {}
    for text, p in texts.items():
        for k in range(len(text) + 1):
            found[text[:k]] = found.get(text[:k], 0.0) + p
    return found


def exact_law(texts, starts, text):
    """The law of the symbol after a text, from the enumeration."""
    law = np.zeros(SYMBOLS)
    law[END] = texts.get(text, 0.0)
    for byte in LETTERS:
        law[byte] = starts.get(text + bytes([byte]), 0.0)
    return law / starts[text]
