"""The range coder against plain integers, and the ends of its messages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from percov2.bitstream import BitstreamError
from percov2.entropy.range_coder import TOTAL, Frequencies, RangeDecoder, RangeEncoder, Symbols
from tests.entropy.reference_range_coder import (
    ImpossibleError,
    ReferenceDecoder,
    last_interval,
    uniform_frequencies,
)

SIZES = (2, 3, 256, 8192)
repeatable = settings(deadline=None, derandomize=True, max_examples=30)


def to_frequencies(weights: np.ndarray) -> Frequencies:
    """Non-negative weights (n, V) to frequencies that sum to `TOTAL`."""
    weights = weights.astype(np.float64) + 1e-300
    shares = weights / weights.sum(1, keepdims=True)
    frequencies = np.floor(shares * (TOTAL - weights.shape[1])).astype(np.int64) + 1
    frequencies[np.arange(len(weights)), weights.argmax(1)] += TOTAL - frequencies.sum(1)
    return frequencies


def make_message(
    count: int, size: int, *, sharpness: float, seed: int
) -> tuple[Symbols, Frequencies]:
    """Symbols drawn at random, not from the frequencies: rare ones occur too."""
    rng = np.random.default_rng(seed)
    frequencies = to_frequencies(rng.random((count, size)) ** sharpness)
    return rng.integers(0, size, count).astype(np.int32), frequencies


def encode(symbols: Symbols, frequencies: Frequencies) -> bytes:
    encoder = RangeEncoder()
    encoder.encode(symbols, frequencies)
    return encoder.finish()


def ideal_bits(symbols: Symbols, frequencies: Frequencies) -> float:
    chosen = frequencies[np.arange(len(symbols)), symbols]
    return float(-np.log2(chosen / TOTAL).sum())


messages = st.builds(
    make_message,
    st.integers(1, 40),
    st.sampled_from((2, 3, 17, 256)),
    sharpness=st.sampled_from((0.0, 1.0, 8.0, 200.0)),
    seed=st.integers(0, 10_000),
)


@repeatable
@given(messages)
def test_what_is_encoded_is_decoded(message: tuple[Symbols, Frequencies]) -> None:
    symbols, frequencies = message
    data = encode(symbols, frequencies)
    np.testing.assert_array_equal(RangeDecoder(data).decode(frequencies), symbols)


@repeatable
@given(messages)
def test_the_reference_decodes_the_same(message: tuple[Symbols, Frequencies]) -> None:
    symbols, frequencies = message
    reference = ReferenceDecoder(encode(symbols, frequencies))
    assert [reference.decode(row) for row in frequencies.tolist()] == symbols.tolist()


@repeatable
@given(messages)
def test_the_end_is_the_shortest_in_the_last_interval(
    message: tuple[Symbols, Frequencies],
) -> None:
    symbols, frequencies = message
    data = encode(symbols, frequencies)
    first, end, words = last_interval(symbols.tolist(), frequencies.tolist())
    length = 8 + 4 * words
    assert 4 * words <= len(data) <= length
    assert first <= int.from_bytes(data.ljust(length, b"\0"), "big") < end
    if len(data) > 4 * words:
        event("shortened")
        unit = 256 ** (length - len(data) + 1)
        assert -(-first // unit) * unit >= end, "a shorter number lies in the interval"
    assert len(data) <= ideal_bits(symbols, frequencies) / 8 + 1.1


@pytest.mark.parametrize("seed", range(8))
def test_no_shorter_string_decodes_to_the_same(seed: int) -> None:
    symbols, frequencies = make_message(12, 3, sharpness=1.0, seed=seed)
    data = encode(symbols, frequencies)
    assert len(data) >= 1
    for last in range(256):
        shorter = data[:-2] + bytes([last]) if len(data) > 1 else b""
        try:
            decoded = RangeDecoder(shorter).decode(frequencies)
        except BitstreamError:
            continue
        assert not np.array_equal(decoded, symbols), last


@repeatable
@given(st.binary(max_size=30), st.sampled_from((2, 3, 256)), st.integers(0, 1000))
@example(b"\xff" * 30, 3, 0)
@example(b"", 3, 0)
def test_any_bytes_mean_the_same_to_the_reference(data: bytes, size: int, seed: int) -> None:
    frequencies = make_message(8, size, sharpness=2.0, seed=seed)[1]
    reference = ReferenceDecoder(data)
    try:
        expected = [reference.decode(row) for row in frequencies.tolist()]
    except ImpossibleError:
        with pytest.raises(BitstreamError, match="cannot be decoded"):
            RangeDecoder(data).decode(frequencies)
        return
    try:
        found = RangeDecoder(data).decode(frequencies)
    except BitstreamError as error:
        assert "too short" in str(error)  # noqa: PT017
        bits = ideal_bits(np.array(expected), frequencies)
        assert bits > 8 * len(data) + 63
        event("too short")
        return
    assert found.tolist() == expected


@pytest.mark.parametrize("size", SIZES)
def test_frequencies_are_ours_to_the_last_bit(size: int) -> None:
    """Symbols at the very borders of their intervals tell frequencies that differ by one."""
    rng = np.random.default_rng(size)
    near = np.full(size, TOTAL // size)
    near[0] += TOTAL - near.sum()
    peaked = np.ones(size, np.int64)
    peaked[size // 2] += TOTAL - size
    rows = [near, peaked, *to_frequencies(rng.random((6, size)) ** 6)]
    state = (1 << 64) - 1
    for row in rows:
        ends = np.concatenate([[0], row.cumsum()])
        for symbol in {0, 1, size // 2, size - 1, int(rng.integers(size))}:
            for quantile in {int(ends[symbol]), int(ends[symbol + 1]) - 1}:
                point = quantile * (state >> 24)
                decoder = RangeDecoder(point.to_bytes(8, "big"))
                assert decoder.decode(row[None]).tolist() == [symbol]


@pytest.mark.parametrize("size", [2, 3, 10, 256, 5000, 65535, 65536])
def test_equally_likely_symbols_mean_the_same_to_the_reference(size: int) -> None:
    rng = np.random.default_rng(size)
    symbols = np.concatenate([[0, size - 1], rng.integers(0, size, 10)]).astype(np.int32)
    encoder = RangeEncoder()
    encoder.encode_uniform(symbols, size)
    data = encoder.finish()
    np.testing.assert_array_equal(RangeDecoder(data).decode_uniform(len(symbols), size), symbols)
    reference, row = ReferenceDecoder(data), uniform_frequencies(size)
    assert [reference.decode(row) for _ in symbols] == symbols.tolist()


@repeatable
@given(st.lists(st.tuples(messages, st.integers(2, 65536)), min_size=1, max_size=4))
def test_messages_of_several_parts(
    parts: list[tuple[tuple[Symbols, Frequencies], int]],
) -> None:
    encoder = RangeEncoder()
    for (symbols, frequencies), size in parts:
        encoder.encode(symbols, frequencies)
        encoder.encode_uniform(np.array([size - 1, 0], np.int32), size)
    decoder = RangeDecoder(encoder.finish())
    for (symbols, frequencies), size in parts:
        np.testing.assert_array_equal(decoder.decode(frequencies), symbols)
        assert decoder.decode_uniform(2, size).tolist() == [size - 1, 0]


def test_a_message_of_no_symbols_is_empty() -> None:
    assert RangeEncoder().finish() == b""


def test_a_message_of_the_first_symbol_alone_is_zeros_for_every_word() -> None:
    """Its number is 0; without the zeros a decoder could not tell it from a cut message."""
    symbols = np.zeros(100, np.int32)
    encoder = RangeEncoder()
    encoder.encode_uniform(symbols, 256)
    data = encoder.finish()
    assert data == bytes(100)
    assert RangeDecoder(data).decode_uniform(100, 256).tolist() == symbols.tolist()


@pytest.mark.parametrize("size", [3, 256])
def test_a_carry_through_many_words_is_written(size: int) -> None:
    """The largest symbols drive the interval to the top of every word."""
    for ending in range(size):
        symbols = np.array([0] + [size - 1] * 60 + [ending], np.int32)
        frequencies = np.broadcast_to(np.array(uniform_frequencies(size)), (len(symbols), size))
        data = encode(symbols, frequencies)
        np.testing.assert_array_equal(RangeDecoder(data).decode(frequencies), symbols)


@pytest.mark.parametrize("size", [2, 3, 5000, 65535])
def test_no_message_of_an_encoder_is_too_short(size: int) -> None:
    """Whatever the symbols cost: the first, the last (which is likelier), the rarest."""
    frequencies = np.ones((300, size), np.int64) if size < 100 else None
    for symbol in (0, size - 1):
        symbols = np.full(300, symbol, np.int32)
        encoder = RangeEncoder()
        encoder.encode_uniform(symbols, size)
        if frequencies is not None:
            frequencies[:] = 1
            frequencies[:, 1 - symbol if symbol < 2 else 0] = TOTAL - size + 1
            encoder.encode(symbols, frequencies)
        decoder = RangeDecoder(encoder.finish())
        assert (decoder.decode_uniform(300, size) == symbol).all()
        if frequencies is not None:
            assert (decoder.decode(frequencies) == symbol).all()


def test_data_far_too_short_are_refused_before_and_after_decoding() -> None:
    with pytest.raises(BitstreamError, match="too short"):
        RangeDecoder(bytes(4)).decode_uniform(10**9, 256)
    rare_zero = np.array([[1, TOTAL - 1]] * 10)
    with pytest.raises(BitstreamError, match="too short"):
        RangeDecoder(b"").decode(rare_zero)


@repeatable
@given(messages, st.integers(0, 200))
def test_a_cut_message_decodes_with_both_fills_to_a_common_beginning(
    message: tuple[Symbols, Frequencies], length: int
) -> None:
    symbols, frequencies = message
    data = encode(symbols, frequencies)[:length]
    found = []
    for fill in (0x00, 0xFF):
        decoder, read = RangeDecoder(data, fill=fill), []
        try:
            for row in frequencies:
                read.append(int(decoder.decode(row[None])[0]))
        except BitstreamError:
            event("undecodable behind the cut")
        found.append(read)
    common = 0
    while common < min(map(len, found)) and found[0][common] == found[1][common]:
        common += 1
    assert found[0][:common] == symbols[:common].tolist()


def test_a_cut_message_keeps_nearly_all_that_its_bytes_hold() -> None:
    symbols, frequencies = make_message(400, 256, sharpness=1.0, seed=2)
    data = encode(symbols, frequencies)
    for length in (40, 100, 250):
        decoders = [RangeDecoder(data[:length], fill=fill) for fill in (0x00, 0xFF)]
        common = 0
        while True:
            one, other = (decoder.decode(frequencies[common][None]) for decoder in decoders)
            if one != other:
                break
            assert one == symbols[common]
            common += 1
        assert ideal_bits(symbols[:common], frequencies[:common]) > 8 * length - 30


def test_a_message_costs_its_information() -> None:
    symbols, frequencies = make_message(2000, 256, sharpness=1.0, seed=1)
    bits = ideal_bits(symbols, frequencies)
    assert bits / 8 - 1 <= len(encode(symbols, frequencies)) <= bits / 8 + 1.1
