"""Caption text to bytes and back: plain UTF-8 or raw deflate, whichever is shorter.

A caption of a few words is incompressible for deflate, so `RAW` is the common case; long or
repetitive text takes `ZLIB`. The mode travels in the container's flags.
"""

from __future__ import annotations

import zlib

from percov2.bitstream import MAX_CAPTION_BYTES, BitstreamError, CaptionMode

__all__ = ["MAX_CAPTION_BYTES", "decode_caption", "encode_caption"]

_RAW_DEFLATE = -15  # zlib's window bits for a stream without header and checksum


def encode_caption(text: str) -> tuple[CaptionMode, bytes]:
    """Code a caption; the empty text costs no byte.

    Args:
        text: Any text of at most `MAX_CAPTION_BYTES` bytes of UTF-8.

    Returns:
        The mode and the coded bytes, as `percov2.bitstream.Stream` takes them.

    Raises:
        ValueError: The text is too long, or holds an unpaired surrogate.
    """
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"caption has an unpaired surrogate U+{ord(text[error.start]):04X} at character "
            f"{error.start}: give valid Unicode text"
        ) from error
    if len(raw) > MAX_CAPTION_BYTES:
        raise ValueError(
            f"caption of {len(raw)} UTF-8 bytes: shorten it to at most {MAX_CAPTION_BYTES}"
        )
    if not raw:
        return CaptionMode.NONE, b""
    deflate = zlib.compressobj(9, zlib.DEFLATED, _RAW_DEFLATE)
    packed = deflate.compress(raw) + deflate.flush()
    if len(packed) < len(raw):
        return CaptionMode.ZLIB, packed
    return CaptionMode.RAW, raw


def decode_caption(mode: CaptionMode, data: bytes) -> str:
    """Decode what `encode_caption` wrote.

    Never produces more than `MAX_CAPTION_BYTES` bytes, whatever `data` claims.

    Raises:
        BitstreamError: `data` is not a caption coded in `mode`.
    """
    if (mode is CaptionMode.NONE) != (not data):
        raise BitstreamError(
            f"caption does not decode: mode {mode.name} with {len(data)} bytes of caption"
        )
    raw = _inflate(data) if mode is CaptionMode.ZLIB else data
    if len(raw) > MAX_CAPTION_BYTES:
        raise BitstreamError(
            f"caption does not decode: it is longer than {MAX_CAPTION_BYTES} bytes"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BitstreamError(
            f"caption does not decode: invalid UTF-8 at byte {error.start}"
        ) from error


def _inflate(data: bytes) -> bytes:
    """Undo raw deflate, stopping one byte beyond the longest caption."""
    inflate = zlib.decompressobj(_RAW_DEFLATE)
    try:
        raw = inflate.decompress(data, MAX_CAPTION_BYTES + 1)
    except zlib.error as error:
        raise BitstreamError(f"caption does not decode: {error}") from error
    if len(raw) <= MAX_CAPTION_BYTES and (not inflate.eof or inflate.unused_data or not raw):
        raise BitstreamError("caption does not decode: its deflate data ends in the wrong place")
    return raw
