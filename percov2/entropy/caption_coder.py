"""Codes a caption with a small language model of captions, into the payload of the tokens.

A caption is a symbol of style (first letter upper or lower case; full stop or none), then pieces:
words with the space before them, and signs. A piece of the vocabulary costs its probability under
`caption_words.WordModel`, which mixes n-grams and a recurrent network. Any other piece is the token
`RARE`, its `Kind`, and an index into a list of rare pieces, or a word of the vocabulary that is
capitalised here, or its bytes under a model of spelling, or plain bytes. The token `END` closes.

All probabilities are made by integer arithmetic from the tables of ``caption_model.safetensors``:
they are the same on every machine. **The model file is part of the format.** A stream decodes only
with the file it was written with, so a retrained file needs a new version of the format, and the
old file has to stay for the old version.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from percov2.bitstream import MAX_CAPTION_BYTES, BitstreamError
from percov2.entropy.caption_ngrams import Integers
from percov2.entropy.caption_text import cut, first_lower, first_upper
from percov2.entropy.caption_words import (
    END,
    FIRST_WORD,
    RARE,
    SPELLING_CONTEXT,
    Kind,
    Predictor,
    WordModel,
)
from percov2.entropy.range_coder import PRECISION, RangeDecoder, RangeEncoder

__all__ = ["MAX_CAPTION_BYTES", "MODEL_FILE", "CaptionCoder"]

MODEL_FILE = Path(__file__).with_name("caption_model.safetensors")

_CAPITAL = 1  # bits of the style
_STOP = 2
_RAW_BYTES = 256  # at most, in one piece
_SPELLED_BYTES = 64
_MAX_PIECES = 1024
_SLACK_BITS = 512  # how much dearer than plain bytes the beginning of a caption may be


class _Tape:
    """Symbols on their way to the coder, and what they cost."""

    def __init__(self) -> None:
        self.bits = 0.0
        self._symbols: list[tuple[NDArray[np.int32], Integers | int]] = []

    def add(self, symbol: int, frequencies: Integers) -> None:
        self._symbols.append((np.array([symbol], np.int32), frequencies))
        self.bits += PRECISION - float(np.log2(frequencies[symbol]))

    def add_uniform(self, symbols: Sequence[int], size: int) -> None:
        self._symbols.append((np.array(symbols, np.int32), size))
        self.bits += len(symbols) * float(np.log2(size))

    def extend(self, other: _Tape) -> None:
        self._symbols += other._symbols
        self.bits += other.bits

    def play(self, encoder: RangeEncoder) -> None:
        for symbols, frequencies in self._symbols:
            if isinstance(frequencies, int):
                encoder.encode_uniform(symbols, frequencies)
            else:
                encoder.encode(symbols, frequencies[None])


class CaptionCoder:
    """Writes captions to a range encoder and reads them back.

    Args:
        model: The caption model; a caption decodes only with the model that coded it.
    """

    def __init__(self, model: WordModel) -> None:
        self._model = model

    @classmethod
    def load(cls, path: Path) -> CaptionCoder:
        """A coder with the model file at `path`."""
        return cls(WordModel(load_file(path)))

    @classmethod
    @cache
    def shipped(cls) -> CaptionCoder:
        """The coder of the format, with the model file of the package; loaded once."""
        return cls.load(MODEL_FILE)

    def encode(self, text: str, encoder: RangeEncoder) -> None:
        """Append a caption.

        Args:
            text: Any text of 1 to `MAX_CAPTION_BYTES` bytes of UTF-8.
            encoder: Takes the symbols.

        Raises:
            ValueError: The text is empty, too long, or holds an unpaired surrogate.
        """
        self._record(text).play(encoder)

    def bits(self, text: str) -> float:
        """Ideal code length of a caption in bits, its end included.

        Raises:
            ValueError: As `encode`.
        """
        return self._record(text).bits

    def decode(self, decoder: RangeDecoder) -> str:
        """Read what `encode` appended.

        Never produces more than `MAX_CAPTION_BYTES` bytes and 1,024 pieces, whatever the data.

        Raises:
            BitstreamError: The data is not a caption.
        """
        style = _read(decoder, self._model.styles)
        raw = self._read_pieces(decoder)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BitstreamError(
                f"caption does not decode: invalid UTF-8 at byte {error.start}"
            ) from error
        if text[:1] != " ":
            raise BitstreamError("caption does not decode: no space before its first word")
        text = (first_upper(text) if style & _CAPITAL else text)[1:] + "." * bool(style & _STOP)
        if not 0 < len(text.encode("utf-8")) <= MAX_CAPTION_BYTES:
            raise _wrong_length()
        return text

    def _record(self, text: str) -> _Tape:
        """The cheaper of two codings: word by word, or all as plain bytes."""
        _check(text)
        style, body = 0, " " + text
        if first_lower(body) != body:
            style |= _CAPITAL
            body = first_lower(body)
        if len(text) > 1 and text.endswith("."):
            style |= _STOP
            body = body[:-1]
        tape = _Tape()
        tape.add(style, self._model.styles)
        words, data = self._record_words(body), body.encode("utf-8")
        if words is None or words.bits > 8 * len(data):
            plain = self._record_units(_chunks(data))
            words = plain if words is None or plain.bits < words.bits else words
        tape.extend(words)
        return tape

    def _record_words(self, body: str) -> _Tape | None:
        """Word by word; nothing where that is clearly worse than plain bytes."""
        model = self._model
        units: list[str | bytes | _Tape] = []
        pending = b""  # plain bytes of neighbouring pieces
        excess = 0.0
        for piece in cut(body):
            data = piece.encode("utf-8")
            known = model.knows(piece)
            spelled = None if known else self._spell(data, after_plain=bool(pending))
            if known or spelled is not None:
                units += [*_chunks(pending), piece if spelled is None else spelled]
                pending = b""
                excess += 0 if spelled is None else spelled.bits - 8 * len(data)
            else:
                pending += data
                excess += 8
            if excess > _SLACK_BITS:
                return None
        units += _chunks(pending)
        return None if len(units) > _MAX_PIECES else self._record_units(units)

    def _record_units(self, units: list[str | bytes | _Tape]) -> _Tape:
        """Known pieces (text), spelled pieces (tapes) and plain bytes, with the end."""
        model, tape, predictor = self._model, _Tape(), Predictor(self._model)
        for unit in units:
            row = predictor.frequencies()
            token = model.token_of.get(unit, RARE) if isinstance(unit, str) else RARE
            tape.add(token, row)
            if token == RARE:
                token = self._record_rare(tape, unit, row)
            predictor.push(token)
        tape.add(END, predictor.frequencies())
        return tape

    def _record_rare(self, tape: _Tape, unit: str | bytes | _Tape, row: Integers) -> int:
        """What follows `RARE`; returns the token for the context."""
        model = self._model
        if isinstance(unit, bytes):
            tape.add(Kind.RAW, model.kinds)
            tape.add_uniform([len(unit) - 1], _RAW_BYTES)
            tape.add_uniform(list(unit), 256)
        elif isinstance(unit, _Tape):
            tape.add(Kind.SPELLED, model.kinds)
            tape.extend(unit)
        elif unit in model.index_of:
            tape.add(Kind.LISTED, model.kinds)
            tape.add_uniform([model.index_of[unit]], len(model.listed))
        else:
            tape.add(Kind.CAPITALISED, model.kinds)
            token = model.token_of[first_lower(unit)]
            tape.add(token, row)
            return token
        return RARE

    def _spell(self, data: bytes, *, after_plain: bool) -> _Tape | None:
        """Bytes under the model of spelling; nothing where plain bytes are cheaper."""
        if len(data) > _SPELLED_BYTES:
            return None
        most = 8 * (len(data) + (not after_plain))  # plain bytes need a length, unless they go on
        tape = _Tape()
        context: tuple[int, ...] = (END,)
        for token in [byte + 1 for byte in data] + [END]:
            tape.add(token, self._model.letters(context))
            context = (*context, token)[-SPELLING_CONTEXT:]
            if tape.bits > most:
                return None
        return tape

    def _read_pieces(self, decoder: RangeDecoder) -> bytes:
        model, predictor, raw = self._model, Predictor(self._model), b""
        for _ in range(_MAX_PIECES + 1):
            row = predictor.frequencies()
            token = _read(decoder, row)
            if token == END:
                return raw
            if token == RARE:
                token, piece = self._read_rare(decoder, row)
            else:
                piece = model.words[token - FIRST_WORD].encode("utf-8")
            raw += piece
            if len(raw) > MAX_CAPTION_BYTES + 1:  # the space before the first word
                raise _wrong_length()
            predictor.push(token)
        raise BitstreamError("caption does not decode: it has no end")

    def _read_rare(self, decoder: RangeDecoder, row: Integers) -> tuple[int, bytes]:
        """The token for the context, and the bytes, of a piece outside the vocabulary."""
        model = self._model
        kind = _read(decoder, model.kinds)
        if kind == Kind.LISTED:
            (index,) = decoder.decode_uniform(1, len(model.listed))
            return RARE, model.listed[index].encode("utf-8")
        if kind == Kind.SPELLED:
            return RARE, self._read_spelling(decoder)
        if kind == Kind.RAW:
            (last,) = decoder.decode_uniform(1, _RAW_BYTES)
            return RARE, decoder.decode_uniform(int(last) + 1, 256).astype(np.uint8).tobytes()
        token = _read(decoder, row)
        if token < FIRST_WORD:
            raise BitstreamError(f"caption does not decode: capital letter for token {token}")
        return token, first_upper(model.words[token - FIRST_WORD]).encode("utf-8")

    def _read_spelling(self, decoder: RangeDecoder) -> bytes:
        piece = bytearray()
        context: tuple[int, ...] = (END,)
        while (token := _read(decoder, self._model.letters(context))) != END:
            piece.append(token - 1)
            if len(piece) > _SPELLED_BYTES:
                raise BitstreamError("caption does not decode: a spelled piece has no end")
            context = (*context, token)[-SPELLING_CONTEXT:]
        if not piece:
            raise BitstreamError("caption does not decode: a spelled piece is empty")
        return bytes(piece)


def _read(decoder: RangeDecoder, frequencies: Integers) -> int:
    return int(decoder.decode(frequencies[None])[0])


def _chunks(data: bytes) -> list[str | bytes | _Tape]:
    return [data[start : start + _RAW_BYTES] for start in range(0, len(data), _RAW_BYTES)]


def _wrong_length() -> BitstreamError:
    return BitstreamError(f"caption does not decode: it is not of 1 to {MAX_CAPTION_BYTES} bytes")


def _check(text: str) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(
            f"caption has an unpaired surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}: give valid Unicode text"
        ) from error
    if not text:
        raise ValueError("caption is empty: store that there is none instead")
    if size > MAX_CAPTION_BYTES:
        raise ValueError(
            f"caption of {size} UTF-8 bytes: shorten it to at most {MAX_CAPTION_BYTES}"
        )
