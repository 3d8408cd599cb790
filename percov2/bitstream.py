"""The `.pcv2` container: one compressed picture in one file.

Layout, in file order; integers are big-endian (docs/bitstream.md has all of the format):

| bytes  | field    | meaning                                                                   |
|--------|----------|---------------------------------------------------------------------------|
| 1      | magic    | `B2`, which can begin neither ASCII nor UTF-8 text                        |
| 1      | version  | `5v`: the magic's second half, and the version v = 1                      |
| 2      | checksum | CRC-16 of every other byte of the file (polynomial 0x1021, initial 0)     |
| 2      | model id | names the weights, codebook and schedule the tokens were coded with       |
| 1      | flags    | bit 0: a caption precedes the tokens; bit 1: tokens are coded as equally  |
|        |          | likely; bit 2: a groups byte follows; bits 3-7: size code                 |
| 0 or 1 | groups   | schedule groups sent, 1 to 63; without this byte, all are                 |
| 0 or 3 | size     | only with size code 0: width - 1 and height - 1, twelve bits each         |
| rest   | payload  | one range-coded message: caption, then tokens                             |

The size code is the size's place in `COMMON_SIZES`, or 0. A size that has a code is always
written by it, so that a stream has exactly one encoding.

The header of a 512x512 picture costs 7 bytes. The checksum finds every damage confined to 16
consecutive bits outside its own field, and any other damage, truncation included, with a
probability of 1 - 2**-16.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"\xb2\x50"
"""The low four bits of the second byte are the version's."""
VERSION = 1
MIN_SIDE = 16
MAX_SIDE = 4096
MAX_STEPS = 63
MAX_CAPTION_BYTES = 4096
"""UTF-8 bytes of a caption before it is coded."""

_MAX_BYTES = 1 << 22
"""Of a file. The largest picture at one token for 8x8 pixels, 24 bits each, takes a quarter."""

COMMON_SIZES = (
    (512, 512),
    (256, 256),
    (768, 512),
    (512, 768),
    (1024, 1024),
    (768, 768),
    (640, 480),
    (480, 640),
    (500, 375),
    (375, 500),
    (640, 427),
    (427, 640),
    (800, 600),
    (600, 800),
    (1024, 768),
    (768, 1024),
    (1280, 720),
    (720, 1280),
    (1920, 1080),
    (1080, 1920),
    (1536, 1024),
    (1024, 1536),
    (1600, 1200),
    (1200, 1600),
    (2048, 1536),
    (1536, 2048),
    (2048, 2048),
    (3840, 2160),
    (2160, 3840),
    (4032, 3024),
    (3024, 4032),
)
"""Width and height of size codes 1 to 31."""

_MAX_MODEL_ID = 0xFFFF
_BODY = 4  # offset of the first byte behind the checksum
_FIXED_BYTES = 7  # magic, version, checksum, model id, flags
_CAPTION, _UNIFORM, _CUT = 1, 2, 4
_SIZE_SHIFT = 3


class BitstreamError(ValueError):
    """A stream that cannot be decoded; the message is one line that says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """The contents of one `.pcv2` file.

    Attributes:
        model_id: identifies the model that wrote the tokens, 0 to 65535.
        width: of the picture in pixels, 16 to 4096.
        height: of the picture in pixels, 16 to 4096.
        steps_sent: schedule groups that are in the payload, 1 to 63; None is all.
        has_caption: the payload begins with a caption.
        uniform: tokens are coded as equally likely, without the masked model.
        payload: range-coded caption and tokens.
    """

    model_id: int
    width: int
    height: int
    steps_sent: int | None
    has_caption: bool
    uniform: bool
    payload: bytes

    @property
    def header_bytes(self) -> int:
        """Bytes of the file that are not payload."""
        return _FIXED_BYTES + len(self._options())

    def to_bytes(self) -> bytes:
        """Write the container.

        Raises:
            ValueError: a field is out of its range.
        """
        problem = self._problem()
        if problem is not None:
            raise ValueError(problem)
        flags = (
            _CAPTION * self.has_caption
            | _UNIFORM * self.uniform
            | _CUT * (self.steps_sent is not None)
            | self._size_code() << _SIZE_SHIFT
        )
        body = self.model_id.to_bytes(2, "big") + bytes([flags]) + self._options() + self.payload
        head = bytes([MAGIC[0], MAGIC[1] | VERSION])
        return head + _checksum(head, body).to_bytes(2, "big") + body

    @classmethod
    def from_bytes(cls, data: bytes, *, verify: bool = True) -> Stream:
        """Read a container: magic, version and checksum first, then the fields.

        Args:
            data: the file's bytes.
            verify: False reads a stream whose end is missing, unverified.

        Raises:
            BitstreamError: not a stream of this version, or damaged.
        """
        _check_envelope(data, verify=verify)
        flags, offset = data[_FIXED_BYTES - 1], _FIXED_BYTES
        steps_sent: int | None = None
        if flags & _CUT:
            steps_sent, offset = data[offset] if len(data) > offset else 0, offset + 1
        code = flags >> _SIZE_SHIFT
        if code:
            width, height = COMMON_SIZES[code - 1]
        else:
            sides, offset = int.from_bytes(data[offset : offset + 3], "big"), offset + 3
            width, height = (sides >> 12) + 1, (sides & 0xFFF) + 1
        if len(data) < offset:
            raise BitstreamError(f"truncated stream: it ends within its header of {offset} bytes")
        stream = cls(
            model_id=int.from_bytes(data[_BODY : _BODY + 2], "big"),
            width=width,
            height=height,
            steps_sent=steps_sent,
            has_caption=bool(flags & _CAPTION),
            uniform=bool(flags & _UNIFORM),
            payload=data[offset:],
        )
        problem = stream._problem()
        if problem is None and code != stream._size_code():
            problem = f"size {width}x{height} is spelled out although it has a code"
        if problem is not None:
            raise BitstreamError(f"inconsistent stream: {problem}")
        return stream

    def _size_code(self) -> int:
        size = (self.width, self.height)
        return COMMON_SIZES.index(size) + 1 if size in COMMON_SIZES else 0

    def _options(self) -> bytes:
        """The part of the header that depends on the flags."""
        groups = b"" if self.steps_sent is None else bytes([self.steps_sent])
        if self._size_code():
            return groups
        return groups + ((self.width - 1) << 12 | (self.height - 1)).to_bytes(3, "big")

    def _problem(self) -> str | None:
        """Why the fields cannot be a stream, or None if they can."""
        if not 0 <= self.model_id <= _MAX_MODEL_ID:
            return f"model id {self.model_id} is outside 0 to {_MAX_MODEL_ID}"
        if not (MIN_SIDE <= self.width <= MAX_SIDE and MIN_SIDE <= self.height <= MAX_SIDE):
            return (
                f"absurd size {self.width}x{self.height}: "
                f"each side must be {MIN_SIDE} to {MAX_SIDE} pixels"
            )
        if self.steps_sent is not None and not 1 <= self.steps_sent <= MAX_STEPS:
            return f"{self.steps_sent} schedule groups sent, must be 1 to {MAX_STEPS}"
        return None


def read_stream(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        BitstreamError: it is larger than any stream.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise BitstreamError(
            f"{path} is larger than any stream ({_MAX_BYTES} bytes): no .pcv2 file"
        )
    return data


def is_intact(data: bytes) -> bool:
    """Whether the checksum holds: a stream whose end is missing fails it."""
    return data[2:_BODY] == _checksum(data[:2], data[_BODY:]).to_bytes(2, "big")


def _check_envelope(data: bytes, *, verify: bool) -> None:
    """Refuse what is not a complete, undamaged stream of this version."""
    if not data:
        raise BitstreamError("empty file, not a .pcv2 stream")
    if data[0] != MAGIC[0] or (len(data) > 1 and data[1] & 0xF0 != MAGIC[1]):
        raise BitstreamError(
            f"wrong magic {data[:2].hex(' ')}: not a .pcv2 stream (they begin with "
            f"{MAGIC[0]:02x} {MAGIC[1] | VERSION:02x})"
        )
    if len(data) > 1 and data[1] & 0x0F != VERSION:
        raise BitstreamError(
            f"unknown stream version {data[1] & 0x0F}, this program reads version {VERSION}: "
            "install the release of percov2 that wrote it"
        )
    if len(data) < _FIXED_BYTES:
        raise BitstreamError(
            f"truncated stream: {len(data)} bytes, the header alone has {_FIXED_BYTES}"
        )
    if verify and not is_intact(data):
        raise BitstreamError(
            f"checksum failed (stored {data[2:_BODY].hex()}, computed "
            f"{_checksum(data[:2], data[_BODY:]):04x}): the file is damaged or truncated, fetch it "
            "again"
        )


def _checksum(head: bytes, body: bytes) -> int:
    return binascii.crc_hqx(body, binascii.crc_hqx(head, 0))
