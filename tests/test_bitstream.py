from __future__ import annotations

import binascii
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2.bitstream import (
    MAGIC,
    MAX_CAPTION_BYTES,
    MAX_SIDE,
    MAX_STEPS,
    MIN_SIDE,
    VERSION,
    BitstreamError,
    CaptionMode,
    Stream,
)

SAMPLE = Stream(
    model_id=0xBEEF,
    width=768,
    height=512,
    steps_sent=5,
    caption_mode=CaptionMode.RAW,
    caption=b"a red door",
    tokens=bytes(range(90)),
)

repeatable = settings(deadline=None, derandomize=True)
sides = st.integers(MIN_SIDE, MAX_SIDE)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    mode = draw(st.sampled_from(CaptionMode))
    smallest, largest = (0, 0) if mode is CaptionMode.NONE else (1, 300)
    return Stream(
        model_id=draw(st.integers(0, 0xFFFF)),
        width=draw(sides),
        height=draw(sides),
        steps_sent=draw(st.integers(1, MAX_STEPS)),
        caption_mode=mode,
        caption=draw(st.binary(min_size=smallest, max_size=largest)),
        tokens=draw(st.binary(max_size=300)),
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
    checksum = binascii.crc_hqx(data[:3] + data[5:], 0)
    return data[:3] + checksum.to_bytes(2, "big") + data[5:]


def with_body(body: bytes) -> bytes:
    return with_valid_checksum(MAGIC + bytes([VERSION, 0, 0]) + body)


@repeatable
@given(streams())
def test_round_trip(stream: Stream) -> None:
    data = stream.to_bytes()
    assert Stream.from_bytes(data) == stream
    assert len(data) == stream.header_bytes + len(stream.caption) + len(stream.tokens)


def test_layout_is_frozen() -> None:
    # Files already written must stay readable: a change here needs a new VERSION.
    stream = replace(SAMPLE, caption=b"hi", tokens=b"\x01\x02\x03")
    assert stream.to_bytes().hex(" ") == "b2 50 01 e3 18 be ef 15 ff 05 ff 03 02 68 69 01 02 03"


def test_header_size() -> None:
    bare = replace(SAMPLE, width=512, height=512, caption_mode=CaptionMode.NONE, caption=b"")
    assert bare.header_bytes == 12
    assert replace(bare, width=128, height=16).header_bytes == 10
    assert SAMPLE.header_bytes == 13
    assert replace(SAMPLE, caption=bytes(128)).header_bytes == 14


@pytest.mark.parametrize("caption_bytes", [1, 127, 128, MAX_CAPTION_BYTES])
def test_caption_lengths(caption_bytes: int) -> None:
    stream = replace(SAMPLE, caption=b"c" * caption_bytes, tokens=b"")
    assert Stream.from_bytes(stream.to_bytes()) == stream


def test_every_flipped_bit_is_refused() -> None:
    data = SAMPLE.to_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            Stream.from_bytes(bytes(damaged))


def test_every_truncation_is_refused() -> None:
    data = SAMPLE.to_bytes()
    for length in range(len(data)):
        with pytest.raises(BitstreamError):
            Stream.from_bytes(data[:length])


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
        raw[data.draw(st.integers(5, min(len(raw), 16) - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.integers(5, len(raw)))
    assert_canonical_or_refused(with_valid_checksum(bytes(raw[:length])))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"\x89PNG\r\n\x1a\n", "wrong magic 89 50: not a .pcv2 stream"),
        (b"P", "wrong magic 50"),
        (MAGIC[:1], "truncated stream: 1 bytes"),
        (MAGIC + bytes([VERSION]) + bytes(4), "truncated stream: 7 bytes"),
        (MAGIC + bytes([2]), "unknown stream version 2.*upgrade percov2"),
        (MAGIC + bytes([VERSION]) + bytes(20), "checksum failed"),
        (with_body(b"\0\0\x07\x0f\x0f"), "unknown caption mode 3.*upgrade percov2"),
        (with_body(b"\0\0\x04\x0e\x0f"), "absurd size 15x16"),
        (with_body(b"\0\0\x04\x0f\x80\x20"), "absurd size 16x4097"),
        (with_body(b"\0\0\x04\xff\xff\x0f"), "absurd width"),
        (with_body(b"\0\0\x04\x8f\x00\x0f"), "width is not in its shortest encoding"),
        (with_body(b"\0\0\x04\x7f\x80"), "truncated stream: it ends within the height"),
        (with_body(b"\0\0\x05\x0f\x0f"), "truncated stream: it ends within the caption length"),
        (with_body(b"\0\0\x05\x0f\x0f\x04abc"), "caption of 4 bytes, 3 are left"),
        (with_body(b"\0\0\x05\x0f\x0f\x00abc"), "caption mode RAW with 0 caption bytes"),
        (with_body(b"\0\0\x05\x0f\x0f\x81\x20" + bytes(4097)), "caption of 4097 bytes"),
        (with_body(b"\0\0\x00\x0f\x0f"), "0 schedule groups sent"),
    ],
)
def test_refusals_name_the_reason(data: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        Stream.from_bytes(data)


def test_version_is_checked_before_the_checksum() -> None:
    future = bytearray(SAMPLE.to_bytes())
    future[2] = 9
    with pytest.raises(BitstreamError, match="version 9"):
        Stream.from_bytes(bytes(future))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (replace(SAMPLE, model_id=-1), "model id -1"),
        (replace(SAMPLE, model_id=1 << 16), "model id 65536"),
        (replace(SAMPLE, width=15), "size 15x512"),
        (replace(SAMPLE, height=4097), "size 768x4097"),
        (replace(SAMPLE, width=0), "size 0x512"),
        (replace(SAMPLE, steps_sent=0), "0 schedule groups"),
        (replace(SAMPLE, steps_sent=64), "64 schedule groups"),
        (replace(SAMPLE, caption=b""), "mode RAW with 0 caption bytes"),
        (replace(SAMPLE, caption_mode=CaptionMode.NONE), "mode NONE with 10 caption bytes"),
        (replace(SAMPLE, caption=bytes(4097)), "caption of 4097 bytes"),
    ],
)
def test_writing_refuses_fields_out_of_range(stream: Stream, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        stream.to_bytes()


def test_magic_is_not_text() -> None:
    assert MAGIC[0] >= 0x80
    with pytest.raises(UnicodeDecodeError):
        MAGIC.decode("utf-8")
