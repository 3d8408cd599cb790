"""The range coder of docs/bitstream.md in plain Python integers, written from that text alone."""

from __future__ import annotations

from collections.abc import Sequence

PRECISION = 24
WORD = 1 << 32
STATE = 1 << 64


class ImpossibleError(Exception):
    """No encoder writes such data."""


class ReferenceDecoder:
    """Decodes one symbol at a time; bytes behind the end are zeros."""

    def __init__(self, data: bytes) -> None:
        self.data, self.position = data, 8
        self.point = int.from_bytes(data[:8].ljust(8, b"\0"), "big")
        self.lower, self.range = 0, STATE - 1

    def decode(self, frequencies: Sequence[int]) -> int:
        assert sum(frequencies) == 1 << PRECISION
        scale = self.range >> PRECISION
        quantile = (self.point - self.lower) % STATE // scale
        if quantile >= 1 << PRECISION:
            raise ImpossibleError
        cumulative, symbol = 0, 0
        while cumulative + frequencies[symbol] <= quantile:
            cumulative += frequencies[symbol]
            symbol += 1
        self.lower = (self.lower + scale * cumulative) % STATE
        self.range = scale * frequencies[symbol]
        if self.range < WORD:
            self.lower = self.lower * WORD % STATE
            self.range *= WORD
            word = self.data[self.position : self.position + 4].ljust(4, b"\0")
            self.point = (self.point * WORD + int.from_bytes(word, "big")) % STATE
            self.position += 4
        return symbol


def uniform_frequencies(size: int) -> list[int]:
    """Equal frequencies; the last symbol takes what is left."""
    share = (1 << PRECISION) // size
    return [share] * (size - 1) + [(1 << PRECISION) - (size - 1) * share]


def last_interval(
    symbols: Sequence[int], frequencies: Sequence[Sequence[int]]
) -> tuple[int, int, int]:
    """(first, end, words): the numbers of 8 + 4 words bytes in [first, end) decode to the symbols.

    The interval is kept as a whole, in one large integer, so that there are no carries.
    """
    first, span, words = 0, STATE - 1, 0
    for symbol, row in zip(symbols, frequencies, strict=True):
        scale = span >> PRECISION
        first, span = first + scale * sum(row[:symbol]), scale * row[symbol]
        if span < WORD:
            first, span, words = first * WORD, span * WORD, words + 1
    return first, first + span, words
