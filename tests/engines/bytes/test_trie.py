"""The trie against a search through the list of tokens."""

import numpy as np

from optimal_sampling.engines.bytes.trie import ROOT, ByteTrie


def test_nodes_are_the_prefixes_of_the_tokens():
    """Guards: children out of order, a token missed where another begins with it, ids that share
    their bytes.
    """
    rng = np.random.default_rng(0)
    tokens = [bytes(rng.integers(0, 3, rng.integers(0, 6))) for _ in range(80)]
    tokens = [token or None for token in tokens]
    trie = ByteTrie(tokens)

    def walk(node, text):
        ids = [int(trie.ids[rank]) for rank in trie.ranks_ending(node)]
        assert sorted(ids) == [i for i, token in enumerate(tokens) if token == text]
        below = trie.ids[trie.first[node] : trie.end[node]]
        assert sorted(below) == [
            i for i, token in enumerate(tokens) if token is not None and token.startswith(text)
        ]
        for byte in range(4):
            child = trie.step(node, byte)
            longer = text + bytes([byte])
            assert (child is not None) == any((t or b"").startswith(longer) for t in tokens)
            if child is not None:
                assert trie.label[child] == byte
                assert child in range(*trie.children(node).indices(10**6))
                walk(child, longer)

    walk(ROOT, b"")
    assert len(trie.label) == len({t[:k] for t in tokens if t for k in range(len(t) + 1)})
