"""An n-gram model in integers: interpolated modified Kneser-Ney (Chen and Goodman, 1999).

The model file holds counts and discounts; the probabilities are made of them here by integer
multiplication and division alone, so that they are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.range_coder import TOTAL

ONE = 1 << 32
"""What a distribution's weights sum to, short of what the divisions round off."""
DISCOUNT_UNIT = 256
BUCKETS_PER_ORDER = 8

Integers = NDArray[np.int64]


def to_frequencies(weights: Integers) -> Integers:
    """Frequencies of the range coder, in proportion to weights (V,) in [0, `ONE`]: (V,)."""
    frequencies: Integers = 1 + weights * (TOTAL - len(weights)) // weights.sum()
    frequencies[np.argmax(weights)] += TOTAL - frequencies.sum()
    return frequencies


class NgramModel:
    """Predicts the next of `vocabulary` tokens from the tokens before it.

    For each order n the file has the n-grams in lexicographic order as ``tokens.n`` (the last
    token), ``counts.n`` (Kneser-Ney's adjusted counts) and, below the highest order,
    ``children.n``: how many (n+1)-grams begin with this n-gram. ``discounts`` (orders, 3) is what
    a count of 1, 2, or more loses, in units of 1 / `DISCOUNT_UNIT`.
    """

    def __init__(self, tables: Mapping[str, NDArray[np.generic]], *, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._discounts = tables["discounts"].astype(np.int64)
        self._orders = len(self._discounts)
        self._bits = int(vocabulary - 1).bit_length()
        self._tokens, self._counts, self._codes, self._offsets = [], [], [], []
        parents = np.zeros(1, np.int64)
        children = np.array([len(tables["tokens.1"])])
        for order in range(1, self._orders + 1):
            tokens = tables[f"tokens.{order}"].astype(np.int64)
            self._tokens.append(tokens)
            self._counts.append(tables[f"counts.{order}"].astype(np.int64))
            self._codes.append(parents)
            self._offsets.append(np.concatenate([[0], np.cumsum(children)]))
            if order < self._orders:
                parents = np.repeat(parents, children) << self._bits | tokens
                children = tables[f"children.{order}"].astype(np.int64)
        uniform = np.full(vocabulary, ONE // vocabulary, np.int64)
        self._unigrams = self._refine(uniform, 1, 0)[0]

    @property
    def buckets(self) -> int:
        """How many kinds of context `distribution` tells apart."""
        return self._orders * BUCKETS_PER_ORDER

    @property
    def unigrams(self) -> Integers:
        """Weights (vocabulary,) of the tokens out of context."""
        return self._unigrams

    def distribution(self, context: Sequence[int]) -> tuple[Integers, int]:
        """Weights (vocabulary,) of the next token, and how well its context is known.

        The second value, in [0, `buckets`), counts the tokens of context that the model has seen
        together, and how often (in powers of two).
        """
        weights, seen = self._unigrams, 1
        order = 1
        for order in range(2, self._orders + 1):
            if order - 1 > len(context):
                return weights, self._bucket(order - 1, seen)
            node = self._find(order, context[len(context) - order + 1 :])
            if node is None:
                return weights, self._bucket(order - 1, seen)
            weights, seen = self._refine(weights, order, node)
        return weights, self._bucket(order, seen)

    def _bucket(self, order: int, seen: int) -> int:
        level = min((seen.bit_length() - 1) // 2, BUCKETS_PER_ORDER - 1) if order > 1 else 0
        return (order - 1) * BUCKETS_PER_ORDER + level

    def _find(self, order: int, context: Sequence[int]) -> int | None:
        """Index of a context of order - 1 tokens that something follows."""
        code = 0
        for token in context:
            code = code << self._bits | token
        codes, offsets = self._codes[order - 1], self._offsets[order - 1]
        node = int(np.searchsorted(codes, code))
        if node == len(codes) or codes[node] != code or offsets[node] == offsets[node + 1]:
            return None
        return node

    def _refine(self, lower: Integers, order: int, node: int) -> tuple[Integers, int]:
        """The distribution of `order` in context `node`, backed by that of the order below."""
        offsets = self._offsets[order - 1]
        chosen = slice(int(offsets[node]), int(offsets[node + 1]))
        counts = self._counts[order - 1][chosen]
        lost = self._discounts[order - 1][np.minimum(counts, 3) - 1]
        seen = int(counts.sum())
        total = seen * DISCOUNT_UNIT
        weights = lower * lost.sum() // total
        weights[self._tokens[order - 1][chosen]] += (counts * DISCOUNT_UNIT - lost) * ONE // total
        return weights, seen
