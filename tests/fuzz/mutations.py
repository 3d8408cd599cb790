"""Streams that no encoder wrote, made of streams that one did."""

from __future__ import annotations

import binascii
from collections.abc import Callable, Sequence

import numpy as np

HEADER_BYTES = 11
"""The longest header."""

Generator = np.random.Generator


def repair_checksum(data: bytes) -> bytes:
    """Make the checksum that of the other bytes, so that what lies behind it is reached."""
    if len(data) < 4:
        return data
    checksum = binascii.crc_hqx(data[:2] + data[4:], 0)
    return data[:2] + checksum.to_bytes(2, "big") + data[4:]


def _flip(rng: Generator, data: bytes, _: bytes) -> bytes:
    damaged = bytearray(data)
    for bit in rng.integers(8 * len(data), size=rng.integers(1, 9)):
        damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def _overwrite(rng: Generator, data: bytes, _: bytes) -> bytes:
    start = int(rng.integers(len(data)))
    length = int(rng.integers(1, 33))
    return data[:start] + rng.bytes(length) + data[start + length :]


def _truncate(rng: Generator, data: bytes, _: bytes) -> bytes:
    return data[: int(rng.integers(len(data)))]


def _extend(rng: Generator, data: bytes, _: bytes) -> bytes:
    length = int(rng.integers(1, 200))
    return data + (bytes(length) if rng.random() < 0.5 else rng.bytes(length))


def _splice(rng: Generator, data: bytes, other: bytes) -> bytes:
    return data[: int(rng.integers(len(data)))] + other[int(rng.integers(len(other))) :]


def _other_header(rng: Generator, data: bytes, other: bytes) -> bytes:
    return data[:HEADER_BYTES] + other[HEADER_BYTES:]


def _random_header(rng: Generator, data: bytes, _: bytes) -> bytes:
    """Random flags, groups and size; mostly with magic and model id."""
    fields = rng.bytes(HEADER_BYTES - 6)
    if rng.random() < 0.5:  # a size in full, mostly a valid one
        fields = bytes([fields[0] & 7]) + fields[1:]
    kept = data[:6] if rng.random() < 0.9 else data[:4] + rng.bytes(2)
    return kept + fields + data[HEADER_BYTES:]


def _huge_picture(rng: Generator, data: bytes, _: bytes) -> bytes:
    """4096x4096 pixels announced by a stream of a few bytes."""
    flags = int(rng.integers(8)) & ~4
    return data[:6] + bytes([flags]) + b"\xff\xff\xff" + data[HEADER_BYTES:]


def _noise(rng: Generator, data: bytes, _: bytes) -> bytes:
    return rng.bytes(int(rng.integers(100)))


MUTATIONS: tuple[Callable[[Generator, bytes, bytes], bytes], ...] = (
    _flip,
    _overwrite,
    _truncate,
    _extend,
    _splice,
    _other_header,
    _random_header,
    _huge_picture,
    _noise,
)


def mutate(rng: Generator, corpus: Sequence[bytes]) -> bytes:
    """One or two mutations of a stream of the corpus; three of four get a valid checksum."""
    data, other = (corpus[i] for i in rng.integers(len(corpus), size=2))
    for _ in range(rng.integers(1, 3)):
        if data:
            data = MUTATIONS[rng.integers(len(MUTATIONS))](rng, data, other)
    return repair_checksum(data) if rng.random() < 0.75 else data
