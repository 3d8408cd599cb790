"""The caption model of one file: its vocabulary and the frequencies of words, letters and kinds."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from percov2.entropy.caption_network import RecurrentModel
from percov2.entropy.caption_ngrams import Integers, NgramModel, to_frequencies
from percov2.entropy.caption_text import first_lower

END = 0
"""Token that ends a caption, or the spelling of a piece; also what stands before the first."""
RARE = 1
"""Token of a piece outside the vocabulary; its `Kind` follows."""
FIRST_WORD = 2
"""Token of the vocabulary's first piece."""
CONTEXT_TOKENS = 64
"""After so many tokens the rest is coded without context, to bound the time."""
MIX_UNIT = 256
LETTERS = 257
"""Tokens of the spelling model: `END`, and every byte plus one."""
SPELLING_CONTEXT = 5
"""Bytes that the spelling model looks at."""

Tables = Mapping[str, NDArray[Any]]


class Kind(IntEnum):
    """How a piece outside the vocabulary is written."""

    LISTED = 0
    """An index into the list of rare pieces."""
    SPELLED = 1
    """Bytes of the spelling model."""
    CAPITALISED = 2
    """A word of the vocabulary whose first letter is upper case here."""
    RAW = 3
    """A length and as many plain bytes."""


def group(tables: Tables, name: str) -> dict[str, NDArray[Any]]:
    """The tables whose names begin with ``name/``, without it."""
    prefix = f"{name}/"
    return {key[len(prefix) :]: table for key, table in tables.items() if key.startswith(prefix)}


def pack_pieces(pieces: list[str]) -> NDArray[np.uint8]:
    """Store pieces of at most 255 bytes: each one's length, then its UTF-8."""
    coded = [piece.encode() for piece in pieces]
    return np.frombuffer(b"".join(bytes([len(piece)]) + piece for piece in coded), np.uint8)


def unpack_pieces(packed: NDArray[np.uint8]) -> list[str]:
    """Undo `pack_pieces`."""
    data, start, pieces = packed.tobytes(), 0, []
    while start < len(data):
        stop = start + 1 + data[start]
        pieces.append(data[start + 1 : stop].decode())
        start = stop
    return pieces


class WordModel:
    """Vocabulary and probabilities, from the tables of a model file."""

    def __init__(self, tables: Tables) -> None:
        self.words = unpack_pieces(tables["words"])
        self.listed = unpack_pieces(tables["listed"])
        self.styles = to_frequencies(tables["styles"].astype(np.int64))
        self.kinds = to_frequencies(tables["kinds"].astype(np.int64))
        self.ngrams = NgramModel(group(tables, "ngrams"), vocabulary=FIRST_WORD + len(self.words))
        self.network = RecurrentModel(group(tables, "network"))
        self._shares = tables["shares"].astype(np.int64)
        self._spelling = NgramModel(group(tables, "spelling"), vocabulary=LETTERS)
        self._letters: dict[tuple[int, ...], Integers] = {}
        self.token_of = {word: FIRST_WORD + index for index, word in enumerate(self.words)}
        self.index_of = {piece: index for index, piece in enumerate(self.listed)}

    def knows(self, piece: str) -> bool:
        """Whether a piece can be written without its letters."""
        return (
            piece in self.token_of or piece in self.index_of or first_lower(piece) in self.token_of
        )

    @cached_property
    def plain(self) -> Integers:
        """Frequencies (V,) of tokens out of context."""
        return to_frequencies(self.ngrams.unigrams)

    def mixed(self, context: list[int], state: Integers) -> Integers:
        """Frequencies (V,) of the next token: n-grams and network, mixed.

        The share of the n-grams depends on how well they know the context.
        """
        counted, bucket = self.ngrams.distribution(context)
        share = self._shares[bucket]
        learnt = self.network.distribution(state)
        return to_frequencies((share * counted + (MIX_UNIT - share) * learnt) // MIX_UNIT)

    def letters(self, context: tuple[int, ...]) -> Integers:
        """Frequencies (`LETTERS`,) of the next byte of a spelled piece.

        Args:
            context: The last tokens, at most `SPELLING_CONTEXT`, with `END` before the first byte.
        """
        row = self._letters.get(context)
        if row is None:
            row = to_frequencies(self._spelling.distribution(context)[0])
            if len(self._letters) < 4096:  # 8 MB
                self._letters[context] = row
        return row


class Predictor:
    """Follows one caption, token by token."""

    def __init__(self, model: WordModel) -> None:
        self._model = model
        self._context = [END]
        self._state = model.network.step(model.network.start(), END)

    def frequencies(self) -> Integers:
        """Frequencies (V,) of the next token."""
        if len(self._context) > CONTEXT_TOKENS:
            return self._model.plain
        return self._model.mixed(self._context, self._state)

    def push(self, token: int) -> None:
        """Note the token that came."""
        self._context.append(token)
        if len(self._context) <= CONTEXT_TOKENS:
            self._state = self._model.network.step(self._state, token)
