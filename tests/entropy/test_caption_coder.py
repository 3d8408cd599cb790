from __future__ import annotations

import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from percov2.bitstream import BitstreamError, CaptionMode
from percov2.entropy.caption_coder import MAX_CAPTION_BYTES, decode_caption, encode_caption


def deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


repeatable = settings(deadline=None, derandomize=True)


@repeatable
@given(st.text(max_size=400))
def test_any_text_round_trips_and_never_grows(text: str) -> None:
    mode, data = encode_caption(text)
    assert decode_caption(mode, data) == text
    assert len(data) <= len(text.encode("utf-8"))
    assert (mode is CaptionMode.NONE) == (text == "") == (data == b"")


def test_the_shorter_coding_is_chosen() -> None:
    assert encode_caption("a dog") == (CaptionMode.RAW, b"a dog")
    mode, data = encode_caption("a dog and a cat, " * 20)
    assert mode is CaptionMode.ZLIB
    assert len(data) < 40


@pytest.mark.parametrize("text", ["x" * MAX_CAPTION_BYTES, "\u20ac" * 1365, "\0\n\U0001f600"])
def test_extreme_texts_round_trip(text: str) -> None:
    assert decode_caption(*encode_caption(text)) == text


@pytest.mark.parametrize("text", ["x" * (MAX_CAPTION_BYTES + 1), "\u20ac" * 1366])
def test_too_long_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="shorten it to at most 4096"):
        encode_caption(text)


def test_unpaired_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unpaired surrogate U\+D83D at character 2"):
        encode_caption("ab\ud83d")


@pytest.mark.parametrize(
    ("mode", "data", "message"),
    [
        (CaptionMode.NONE, b"x", "mode NONE with 1 bytes"),
        (CaptionMode.RAW, b"", "mode RAW with 0 bytes"),
        (CaptionMode.RAW, b"abc\xff", "invalid UTF-8 at byte 3"),
        (CaptionMode.RAW, b"\xed\xa0\xbd", "invalid UTF-8"),  # a surrogate
        (CaptionMode.RAW, b"x" * (MAX_CAPTION_BYTES + 1), "longer than 4096"),
        (CaptionMode.ZLIB, b"\xff\xff", "caption does not decode"),
        (CaptionMode.ZLIB, deflate(b"hello")[:-1], "ends in the wrong place"),
        (CaptionMode.ZLIB, deflate(b"hello") + b"\0", "ends in the wrong place"),
        (CaptionMode.ZLIB, deflate(b""), "ends in the wrong place"),
        (CaptionMode.ZLIB, deflate(b"\xff\xfe"), "invalid UTF-8"),
        (CaptionMode.ZLIB, deflate(bytes(MAX_CAPTION_BYTES + 1)), "longer than 4096"),
    ],
)
def test_bad_data_is_refused(mode: CaptionMode, data: bytes, message: str) -> None:
    with pytest.raises(BitstreamError, match=message):
        decode_caption(mode, data)


def test_decompression_bomb_is_bounded() -> None:
    bomb = deflate(bytes(50_000_000))
    tracemalloc.start()
    with pytest.raises(BitstreamError, match="longer than 4096"):
        decode_caption(CaptionMode.ZLIB, bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@repeatable
@given(st.sampled_from(CaptionMode), st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(mode: CaptionMode, data: bytes) -> None:
    try:
        text = decode_caption(mode, data)
    except BitstreamError:
        return
    assert (mode is CaptionMode.NONE) == (text == "")
