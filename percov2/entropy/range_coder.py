"""Range coding of symbols with integer frequencies, on the library constriction.

The coder is that of constriction: a 64-bit state, 32-bit words, 24-bit frequencies. Its models take
floating-point weights and give symbol i the frequency ``1 + w_i (2^24 - V) / sum(w)``. We hand it
``w_i = f_i - 1``, whose sum is 2^24 - V: the quotient is exactly one, every sum is an integer
below 2^24, and the frequencies that it codes with are ours to the last bit (docs/bitstream.md).
"""

from __future__ import annotations

import math

import constriction
import numpy as np
from numpy.typing import NDArray

from percov2.bitstream import BitstreamError

PRECISION = 24
TOTAL = 1 << PRECISION
"""What the frequencies of a symbol's alternatives sum to."""

Symbols = NDArray[np.int32]
Frequencies = NDArray[np.int64]
"""(n, V), every entry at least 1, every row with sum `TOTAL`."""

_WORD_BYTES = 4
_STATE_BYTES = 8
_FILL_BYTES = 4096
"""Other bytes than zeros behind a cut: more than enough to tell two decodings apart."""
_SPARE_BITS = 64.0
"""Information that may be read beyond the data's own. `RangeEncoder.finish` needs 32 bits; twice
that keeps the rounding of the count out of the decision."""


def _weights(frequencies: Frequencies) -> NDArray[np.float32]:
    assert (frequencies >= 1).all()
    assert (frequencies.sum(1) == TOTAL).all()
    return (frequencies - 1).astype(np.float32)


def _family() -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(perfect=False)


class RangeEncoder:
    """Appends symbols to one payload; `finish` returns it."""

    def __init__(self) -> None:
        self._encoder = constriction.stream.queue.RangeEncoder()

    def encode(self, symbols: Symbols, frequencies: Frequencies) -> None:
        """Append symbols (n,), each with its own frequencies (n, V)."""
        self._encoder.encode(symbols, _family(), _weights(frequencies))

    def encode_uniform(self, symbols: Symbols, size: int) -> None:
        """Append symbols (n,) in [0, size), all equally likely; 2 <= size <= 65536."""
        self._encoder.encode(symbols, constriction.stream.model.Uniform(size))

    def finish(self) -> bytes:
        """The fewest bytes that decode to the symbols so far.

        A range coder may end with any number of its last interval, and the decoder reads zeros
        behind the end: the number with the most trailing zero bytes is written, without them.
        Only the last eight bytes are shortened, so that `RangeDecoder` can tell data that ends
        too early for what is read from it.
        """
        words_out, (lower, width) = self._encoder.pos()
        length = _WORD_BYTES * words_out + _STATE_BYTES
        written = self._encoder.get_compressed().astype(">u4").tobytes()[:length]
        inside = int.from_bytes(written.ljust(length, b"\0"), "big")
        # The library's number lies in the interval. Where its low half is below the interval's,
        # a carry has gone into the words before.
        head, low = divmod(inside, 1 << 8 * _STATE_BYTES)
        first = (head - (low < lower) << 8 * _STATE_BYTES) + lower
        assert first <= inside < first + width
        for kept in range(length - _STATE_BYTES, length + 1):
            unit = 1 << 8 * (length - kept)
            number = -(-first // unit)
            if number * unit < first + width:
                return int(number).to_bytes(kept, "big")
        raise AssertionError("an interval holds its own first number")


class RangeDecoder:
    """Reads symbols back, in the order in which they were written.

    Args:
        data: what `RangeEncoder.finish` returned, or its beginning.
        fill: value of the bytes behind the end. Zero is what the encoder reckons with; a cut
            stream decodes alike with 0 and 255 as far as its bytes determine it.
    """

    def __init__(self, data: bytes, *, fill: int = 0) -> None:
        # Behind the last word constriction reads zeros by itself.
        padding = -len(data) % _WORD_BYTES + (_FILL_BYTES if fill else 0)
        words = np.frombuffer(data + bytes([fill]) * padding, ">u4")
        self._decoder = constriction.stream.queue.RangeDecoder(words.astype(np.uint32))
        self._bits_left = 8 * len(data) + _SPARE_BITS

    def decode(self, frequencies: Frequencies) -> Symbols:
        """Read a symbol for each row of frequencies (n, V).

        Raises:
            BitstreamError: the data cannot come from an encoder.
        """
        try:
            symbols = self._decoder.decode(_family(), _weights(frequencies))
        except AssertionError as error:  # what constriction raises on impossible data
            raise _undecodable() from error
        chosen = frequencies[np.arange(len(symbols)), symbols]
        self._spend(PRECISION * len(symbols) - float(np.log2(chosen).sum()))
        return np.asarray(symbols, dtype=np.int32)

    def decode_uniform(self, count: int, size: int) -> Symbols:
        """Read ``count`` symbols in [0, size), all equally likely.

        Raises:
            BitstreamError: the data cannot come from an encoder.
        """
        # The last symbol has what is left of `TOTAL`: up to twice the others' frequency.
        most = TOTAL - (size - 1) * (TOTAL // size)
        self._spend(count * (PRECISION - math.log2(most)))
        model = constriction.stream.model.Uniform(size)
        try:
            return np.asarray(self._decoder.decode(model, count), dtype=np.int32)
        except AssertionError as error:
            raise _undecodable() from error

    def _spend(self, bits: float) -> None:
        """Stop soon where a header asks for far more than there is.

        An encoder's data has at least 4 bytes for every 32 bits of information but the last 32.
        """
        self._bits_left -= bits
        if self._bits_left < 0:
            raise BitstreamError(
                "payload is too short for what its header announces: the stream is truncated, "
                "corrupt or of another model"
            )


def _undecodable() -> BitstreamError:
    return BitstreamError("payload cannot be decoded: the stream is corrupt or of another model")
