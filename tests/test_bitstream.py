from __future__ import annotations

import binascii
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2.bitstream import (
    COMMON_SIZES,
    MAGIC,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    VERSION,
    BitstreamError,
    Stream,
    is_intact,
)

SAMPLE = Stream(
    model_id=0xBEEF,
    width=700,
    height=512,
    steps_sent=5,
    has_caption=True,
    uniform=False,
    payload=bytes(range(90)),
)

repeatable = settings(deadline=None, derandomize=True)
sides = st.integers(MIN_SIDE, MAX_SIDE)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    width, height = draw(st.sampled_from(COMMON_SIZES) | st.tuples(sides, sides))
    return Stream(
        model_id=draw(st.integers(0, 0xFFFF)),
        width=width,
        height=height,
        steps_sent=draw(st.none() | st.integers(1, MAX_STEPS)),
        has_caption=draw(st.booleans()),
        uniform=draw(st.booleans()),
        payload=draw(st.binary(max_size=300)),
    )


def parsed_or_reason(data: bytes) -> Stream | str:
    try:
        return Stream.from_bytes(data)
    except BitstreamError as error:
        return str(error)


def assert_canonical_or_refused(data: bytes) -> None:
    outcome = parsed_or_reason(data)
    if isinstance(outcome, Stream):
        assert outcome.to_bytes() == data  # only one encoding of a stream is accepted
    else:
        assert outcome
        assert "\n" not in outcome


def with_valid_checksum(data: bytes) -> bytes:
    checksum = binascii.crc_hqx(data[:2] + data[4:], 0)
    return data[:2] + checksum.to_bytes(2, "big") + data[4:]


def with_body(body: bytes) -> bytes:
    return with_valid_checksum(bytes([MAGIC[0], MAGIC[1] | VERSION, 0, 0]) + body)


@repeatable
@given(streams())
def test_round_trip(stream: Stream) -> None:
    data = stream.to_bytes()
    assert Stream.from_bytes(data) == stream
    assert Stream.from_bytes(data, verify=False) == stream
    assert len(data) == stream.header_bytes + len(stream.payload)
    assert is_intact(data)


def test_layout_is_frozen() -> None:
    # Files already written must stay readable: a change here needs a new VERSION.
    spelled = replace(SAMPLE, payload=b"\x01\x02\x03")
    assert spelled.to_bytes().hex(" ") == "b2 51 fa cc be ef 05 05 2b b1 ff 01 02 03"
    coded = replace(spelled, width=768, steps_sent=None, has_caption=False, uniform=True)
    assert coded.to_bytes().hex(" ") == "b2 51 51 ca be ef 1a 01 02 03"


def test_common_sizes_are_frozen() -> None:
    assert len(COMMON_SIZES) == len(set(COMMON_SIZES)) == 31
    assert binascii.crc32(repr(COMMON_SIZES).encode()) == 0xAEABADBE


def test_header_size() -> None:
    bare = replace(SAMPLE, width=512, height=512, steps_sent=None)
    assert bare.header_bytes == 7
    assert len(replace(bare, payload=b"").to_bytes()) == 7
    assert replace(bare, steps_sent=5).header_bytes == 8
    assert replace(bare, width=510).header_bytes == 10
    assert SAMPLE.header_bytes == 11


@pytest.mark.parametrize("code", range(1, 32))
def test_every_common_size_has_its_code(code: int) -> None:
    width, height = COMMON_SIZES[code - 1]
    data = replace(SAMPLE, width=width, height=height).to_bytes()
    assert data[6] >> 3 == code
    spelled = bytes([data[6] & 7]) + data[7:8] + (width - 1 << 12 | height - 1).to_bytes(3, "big")
    with pytest.raises(BitstreamError, match="is spelled out although it has a code"):
        Stream.from_bytes(with_body(data[4:6] + spelled))


@pytest.mark.parametrize("size", [(16, 16), (4096, 4096), (16, 4096), (257, 255)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    stream = replace(SAMPLE, width=size[0], height=size[1])
    assert Stream.from_bytes(stream.to_bytes()) == stream


def test_every_flipped_bit_is_refused() -> None:
    data = SAMPLE.to_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not is_intact(bytes(damaged))
        with pytest.raises(BitstreamError):
            Stream.from_bytes(bytes(damaged))


def test_every_truncation_is_refused() -> None:
    data = SAMPLE.to_bytes()
    for length in range(len(data)):
        assert not is_intact(data[:length])
        with pytest.raises(BitstreamError):
            Stream.from_bytes(data[:length])


def test_a_cut_stream_is_read_unverified_once_its_header_is_whole() -> None:
    data = SAMPLE.to_bytes()
    for length in range(SAMPLE.header_bytes):
        with pytest.raises(BitstreamError, match=r"truncated stream|empty file"):
            Stream.from_bytes(data[:length], verify=False)
    for length in range(SAMPLE.header_bytes, len(data)):
        cut = Stream.from_bytes(data[:length], verify=False)
        assert cut == replace(SAMPLE, payload=SAMPLE.payload[: length - SAMPLE.header_bytes])


@pytest.mark.parametrize("suffix", [b"\0", b"\xff", bytes(2), bytes(100)])
def test_trailing_bytes_are_refused(suffix: bytes) -> None:
    with pytest.raises(BitstreamError, match="checksum failed"):
        Stream.from_bytes(SAMPLE.to_bytes() + suffix)


@repeatable
@given(st.binary(max_size=60))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BitstreamError):
        Stream.from_bytes(data)


@repeatable
@given(st.binary(max_size=40))
def test_random_body_with_valid_checksum_parses_or_is_refused(body: bytes) -> None:
    assert_canonical_or_refused(with_body(body))


@repeatable
@given(streams(), st.data())
def test_mutated_stream_with_valid_checksum_parses_or_is_refused(
    stream: Stream, data: st.DataObject
) -> None:
    raw = bytearray(stream.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(4, min(len(raw), 14) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(4, len(raw)))
    assert_canonical_or_refused(with_valid_checksum(bytes(raw[:length])))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"\x89PNG\r\n\x1a\n", "wrong magic 89 50: not a .pcv2 stream"),
        (b"P", "wrong magic 50"),
        (b"\xb2\x61", "wrong magic b2 61"),
        (MAGIC[:1], "truncated stream: 1 bytes"),
        (b"\xb2\x51" + bytes(4), "truncated stream: 6 bytes"),
        (b"\xb2\x52", "unknown stream version 2, this program reads version 1: install"),
        (b"\xb2\x51" + bytes(20), "checksum failed"),
        (with_body(b"\0\0\x00\x00\xe0\x0f"), "absurd size 15x16"),
        (with_body(b"\0\0\x00\x00\xf0\x0e"), "absurd size 16x15"),
        (with_body(b"\0\0\x04"), "truncated stream: it ends within its header of 11 bytes"),
        (with_body(b"\0\0\x0c"), "truncated stream: it ends within its header of 8 bytes"),
        (with_body(b"\0\0\x00\xff\xff"), "it ends within its header of 10 bytes"),
        (with_body(b"\0\0\x0c\x00"), "0 schedule groups sent"),
        (with_body(b"\0\0\x0c\x40"), "64 schedule groups sent"),
        (with_body(b"\0\0\x00\x1f\xf1\xff"), "size 512x512 is spelled out"),
    ],
)
def test_refusals_name_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        Stream.from_bytes(data)


def test_version_is_checked_before_the_checksum() -> None:
    future = bytearray(SAMPLE.to_bytes())
    future[1] = MAGIC[1] | 9
    with pytest.raises(BitstreamError, match="version 9"):
        Stream.from_bytes(bytes(future))
    with pytest.raises(BitstreamError, match="version 9"):
        Stream.from_bytes(bytes(future), verify=False)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (replace(SAMPLE, model_id=-1), "model id -1"),
        (replace(SAMPLE, model_id=1 << 16), "model id 65536"),
        (replace(SAMPLE, width=15), "size 15x512"),
        (replace(SAMPLE, height=4097), "size 700x4097"),
        (replace(SAMPLE, width=0), "size 0x512"),
        (replace(SAMPLE, steps_sent=0), "0 schedule groups"),
        (replace(SAMPLE, steps_sent=64), "64 schedule groups"),
    ],
)
def test_writing_refuses_fields_out_of_range(stream: Stream, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stream.to_bytes()


def test_magic_is_not_text() -> None:
    assert MAGIC[0] >= 0x80
    for version in range(16):
        with pytest.raises(UnicodeDecodeError):
            bytes([MAGIC[0], MAGIC[1] | version]).decode("utf-8")
