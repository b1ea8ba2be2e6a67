"""`ByteTrie`: the tokens of a vocabulary by their bytes, as arrays.

Tokens are sorted by their bytes. A node is a string with which tokens begin: a range of ranks.
Nodes are numbered level by level, so that the children of a node are consecutive numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Bool, Int

from optimal_sampling.engines.bytes import utf8

__all__ = ["ROOT", "ByteTrie"]

ROOT = 0


class ByteTrie:
    """`of_id`: the bytes of every token id; None for ids that write nothing."""

    ids: Int[np.ndarray, " tokens"]
    """The id of every rank."""
    words: list[bytes]
    """The bytes of every rank, in order."""
    first: Int[np.ndarray, " nodes"]
    """The first rank of every node. Tokens that end at the node come first."""
    ending: Int[np.ndarray, " nodes"]
    """How many tokens end at the node: several ids may have the same bytes."""
    end: Int[np.ndarray, " nodes"]
    """One more than the last rank of every node."""
    child: Int[np.ndarray, " nodes_and_one"]
    """The first child of every node; its last one comes before the first of the next node."""
    label: Int[np.ndarray, " nodes"]
    """The last byte of every node; 0 of the root."""

    def __init__(self, of_id: Sequence[bytes | None]) -> None:
        ranked = sorted((written, index) for index, written in enumerate(of_id) if written)
        self.words = words = [written for written, _ in ranked]
        self.ids = np.array([index for _, index in ranked], dtype=np.int64)
        self._following: dict[utf8.State, Bool[np.ndarray, " tokens"]] = {}
        self._build(words)

    def _build(self, words: list[bytes]) -> None:
        """Level by level: the range of a node falls into those of its children."""
        ranges = [(0, len(words))]
        first, ending, end, child, label = [], [], [], [], [0]
        nodes, depth = 1, 0
        while ranges:
            below = []
            for start, stop in ranges:
                inner = start
                while inner < stop and len(words[inner]) == depth:
                    inner += 1
                first.append(start)
                ending.append(inner - start)
                end.append(stop)
                child.append(nodes)
                letters = [word[depth] for word in words[inner:stop]]
                for byte, group in groupby(letters):
                    count = sum(1 for _ in group)
                    below.append((inner, inner + count))
                    inner += count
                    label.append(byte)
                    nodes += 1
            ranges = below
            depth += 1
        arrays = (first, ending, end, [*child, nodes], label)
        self.first, self.ending, self.end, self.child, self.label = (
            np.array(values, dtype=np.int64) for values in arrays
        )
        # plain Python numbers: reading one from an array costs ten times as much
        self._child, self._first = self.child.tolist(), self.first.tolist()
        self._ending = self.ending.tolist()
        self._labels = bytes(label)

    def children(self, node: int) -> slice:
        """Numbers of the nodes that are one byte longer."""
        return slice(self._child[node], self._child[node + 1])

    def step(self, node: int, byte: int) -> int | None:
        """The node with this byte appended; None where no token goes on so."""
        place = self._labels.find(byte, self._child[node], self._child[node + 1])
        return None if place < 0 else place

    def ranks_ending(self, node: int) -> range:
        """Ranks of the tokens whose bytes are exactly the node's."""
        first = self._first[node]
        return range(first, first + self._ending[node])

    def following(self, state: utf8.State) -> Bool[np.ndarray, " tokens"]:
        """By rank, whether a text in this state stays valid UTF-8 with the token."""
        if state not in self._following:
            found = [
                state == utf8.BETWEEN if word.isascii() else utf8.can_follow(state, word)
                for word in self.words
            ]
            self._following[state] = np.array(found, dtype=bool)
        return self._following[state]
