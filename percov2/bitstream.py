"""The `.pcv2` container: one compressed picture in one file.

Layout, in file order; integers are big-endian:

| bytes  | field      | meaning                                                               |
|--------|------------|-----------------------------------------------------------------------|
| 2      | magic      | `B2 50`; the first byte can begin neither ASCII nor UTF-8 text        |
| 1      | version    | 1                                                                     |
| 2      | checksum   | CRC-16 of every other byte of the file (polynomial 0x1021, initial 0) |
| 2      | model id   | names the weights, codebook and schedule the tokens were coded with   |
| 1      | flags      | bits 0-1: caption mode; bits 2-7: schedule groups sent (1 to 63)      |
| 1 or 2 | width - 1  | varint, pixels                                                        |
| 1 or 2 | height - 1 | varint, pixels                                                        |
| 1 or 2 | length     | varint, only with a caption: bytes of the coded caption (1 to 4096)   |
| length | caption    | only with a caption                                                   |
| rest   | tokens     | entropy-coded tokens, to the end of the file                          |

A varint is unsigned LEB128: seven bits a byte, least significant first, the top bit set on every
byte but the last. Only the shortest encoding is valid, so a stream has exactly one encoding.

A 512x512 picture without a caption costs a header of 12 bytes. The checksum finds every damage
confined to 16 consecutive bits outside its own field, and any other damage, truncation included,
with a probability of 1 - 2**-16.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from enum import IntEnum

MAGIC = b"\xb2P"
VERSION = 1
MIN_SIDE = 16
MAX_SIDE = 4096
MAX_STEPS = 63
MAX_CAPTION_BYTES = 4096

_MAX_MODEL_ID = 0xFFFF
_BODY = 5  # offset of the first byte behind the checksum
_FIXED_BYTES = 8  # magic, version, checksum, model id, flags


class BitstreamError(ValueError):
    """A stream that cannot be decoded; the message is one line that says why."""


class CaptionMode(IntEnum):
    """How the caption's bytes are coded (see `percov2.entropy.caption_coder`)."""

    NONE = 0
    RAW = 1
    ZLIB = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The contents of one `.pcv2` file.

    Attributes:
        model_id: Identifies the model that wrote the tokens, 0 to 65535.
        width: Width of the picture in pixels, 16 to 4096.
        height: Height of the picture in pixels, 16 to 4096.
        steps_sent: Schedule groups that are in the stream, 1 to 63.
        caption_mode: How `caption` is coded.
        caption: The coded caption, at most 4096 bytes; empty if and only if the mode is `NONE`.
        tokens: The entropy-coded tokens.
    """

    model_id: int
    width: int
    height: int
    steps_sent: int
    caption_mode: CaptionMode
    caption: bytes
    tokens: bytes

    @property
    def header_bytes(self) -> int:
        """Bytes of the file that are neither caption nor tokens."""
        return _FIXED_BYTES + len(self._sizes())

    def to_bytes(self) -> bytes:
        """Write the container.

        Raises:
            ValueError: A field is out of its range.
        """
        problem = self._problem()
        if problem is not None:
            raise ValueError(problem)
        flags = self.steps_sent << 2 | self.caption_mode
        body = b"".join(
            (
                self.model_id.to_bytes(2, "big"),
                flags.to_bytes(1, "big"),
                self._sizes(),
                self.caption,
                self.tokens,
            )
        )
        head = MAGIC + bytes([VERSION])
        return head + _checksum(head, body).to_bytes(2, "big") + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Stream:
        """Read a container: magic, version and checksum first, then the fields.

        Raises:
            BitstreamError: `data` is not a stream of this version, or is damaged.
        """
        _check_envelope(data)
        model_id = int.from_bytes(data[_BODY : _BODY + 2], "big")
        steps_sent, mode_number = divmod(data[_BODY + 2], 4)
        try:
            caption_mode = CaptionMode(mode_number)
        except ValueError:
            raise BitstreamError(
                f"unknown caption mode {mode_number}: upgrade percov2 or compress the picture again"
            ) from None
        width, offset = _read_varint(data, _FIXED_BYTES, what="width")
        height, offset = _read_varint(data, offset, what="height")
        length = 0
        if caption_mode is not CaptionMode.NONE:
            length, offset = _read_varint(data, offset, what="caption length")
            if length > len(data) - offset:
                raise BitstreamError(
                    f"inconsistent stream: caption of {length} bytes, {len(data) - offset} are left"
                )
        stream = cls(
            model_id=model_id,
            width=width + 1,
            height=height + 1,
            steps_sent=steps_sent,
            caption_mode=caption_mode,
            caption=data[offset : offset + length],
            tokens=data[offset + length :],
        )
        problem = stream._problem()
        if problem is not None:
            raise BitstreamError(f"inconsistent stream: {problem}")
        return stream

    def _sizes(self) -> bytes:
        """The variable-length part of the header."""
        sizes = _varint(self.width - 1) + _varint(self.height - 1)
        if self.caption_mode is CaptionMode.NONE:
            return sizes
        return sizes + _varint(len(self.caption))

    def _problem(self) -> str | None:
        """Why the fields cannot be a stream, or None if they can."""
        if not 0 <= self.model_id <= _MAX_MODEL_ID:
            return f"model id {self.model_id} is outside 0 to {_MAX_MODEL_ID}"
        if not (MIN_SIDE <= self.width <= MAX_SIDE and MIN_SIDE <= self.height <= MAX_SIDE):
            return (
                f"absurd size {self.width}x{self.height}: "
                f"each side must be {MIN_SIDE} to {MAX_SIDE} pixels"
            )
        if not 1 <= self.steps_sent <= MAX_STEPS:
            return f"{self.steps_sent} schedule groups sent, must be 1 to {MAX_STEPS}"
        if len(self.caption) > MAX_CAPTION_BYTES:
            return f"coded caption of {len(self.caption)} bytes, at most {MAX_CAPTION_BYTES} fit"
        if (self.caption_mode is CaptionMode.NONE) != (not self.caption):
            return f"caption mode {self.caption_mode.name} with {len(self.caption)} caption bytes"
        return None


def _check_envelope(data: bytes) -> None:
    """Refuse what is not a complete, undamaged stream of this version."""
    if not data:
        raise BitstreamError("empty file, not a .pcv2 stream")
    if data[:2] != MAGIC[: len(data)]:
        raise BitstreamError(
            f"wrong magic {data[:2].hex(' ')}: not a .pcv2 stream (they begin with "
            f"{MAGIC.hex(' ')})"
        )
    if len(data) > 2 and data[2] != VERSION:
        raise BitstreamError(
            f"unknown stream version {data[2]}, this program reads version {VERSION}: "
            "upgrade percov2"
        )
    if len(data) < _FIXED_BYTES + 2:
        raise BitstreamError(
            f"truncated stream: {len(data)} bytes, at least {_FIXED_BYTES + 2} expected"
        )
    stored = int.from_bytes(data[3:_BODY], "big")
    computed = _checksum(data[:3], data[_BODY:])
    if stored != computed:
        raise BitstreamError(
            f"checksum failed (stored {stored:04x}, computed {computed:04x}): "
            "the file is damaged or truncated, fetch it again"
        )


def _checksum(head: bytes, body: bytes) -> int:
    return binascii.crc_hqx(body, binascii.crc_hqx(head, 0))


def _varint(value: int) -> bytes:
    """Encode 0 to 16383 in one or two bytes."""
    assert 0 <= value < 1 << 14
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80, value >> 7])


def _read_varint(data: bytes, offset: int, *, what: str) -> tuple[int, int]:
    """Decode the varint at `offset`; returns its value and the offset behind it."""
    field = data[offset : offset + 2]
    if field and field[0] < 0x80:
        return field[0], offset + 1
    if len(field) < 2:
        raise BitstreamError(f"truncated stream: it ends within the {what}")
    if field[1] >= 0x80:
        raise BitstreamError(f"absurd {what}: its encoding is longer than two bytes")
    if field[1] == 0:
        raise BitstreamError(f"inconsistent stream: the {what} is not in its shortest encoding")
    return field[0] & 0x7F | field[1] << 7, offset + 2
