"""Feeds mutated streams to the codecs of the golden streams and watches time and memory."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from percov2.bitstream import BitstreamError
from percov2.codec import Codec
from percov2.entropy.schedules import make_schedule
from percov2.inspection import describe
from tests.fuzz.mutations import mutate
from tests.golden.store import golden_codec, read_manifest

MAX_SECONDS_TO_FAIL = 1.0
MAX_SECONDS_TO_DECODE = 30.0
MAX_BYTES = 1 << 30


class FaultError(AssertionError):
    """A stream that did what no stream may."""


@dataclass
class Report:
    """What became of the streams.

    Attributes:
        outcomes: how many decoded, and how many were refused for what reason.
        slowest_failure: seconds of CPU time.
        slowest_decoding: seconds of CPU time.
        memory: growth of the process's largest size in bytes.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_failure: float = 0.0
    slowest_decoding: float = 0.0
    memory: int = 0


def _largest_size() -> int:
    """Peak memory of this process in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _decode(codec: Codec, data: bytes) -> str:
    """Decode and describe a stream; returns what happened."""
    try:
        tokens = codec.decode_tokens(data)
        described = describe(data, codec.summary)
    except BitstreamError as error:
        message = str(error)
        if not message or "\n" in message:
            raise FaultError(f"message is not one line: {message!r}") from error
        return message
    codes = codec.components.tokenizer.quantizer.codebook_size
    if not (tokens.min() >= -1 and tokens.max() < codes):
        raise FaultError(f"tokens in [{tokens.min()}, {tokens.max()}]")
    if sum(described["bytes"].values()) != 2 * len(data):
        raise FaultError(f"bytes do not sum to their total: {described['bytes']}")
    return "decoded"


def _timed_decode(codec: Codec, data: bytes) -> tuple[str, float]:
    """What happened, and the seconds of CPU time that it took."""
    start = time.process_time()
    outcome = _decode(codec, data)
    return outcome, time.process_time() - start


def _limit(outcome: str) -> float:
    """Seconds that a stream may take."""
    return MAX_SECONDS_TO_DECODE if outcome == "decoded" else MAX_SECONDS_TO_FAIL


def run(*, count: int, seed: int, progress: Callable[[int], None] | None = None) -> Report:
    """Decode mutated streams.

    Args:
        count: of streams.
        seed: of the mutations.
        progress: is told how many are done.

    Raises:
        FaultError: a stream was neither decoded nor refused by `BitstreamError`, or took too
            long or too much memory; its bytes are in the message.
    """
    manifest = read_manifest()
    corpus = [stream.path.read_bytes() for stream in manifest]
    codecs = {stream.model_id: golden_codec(stream.schedule) for stream in manifest}
    for stream in manifest:  # what is loaded and cached once is not the mutations' doing
        codecs[stream.model_id].decode_tokens(stream.path.read_bytes())
    rng, report, before = np.random.default_rng(seed), Report(), _largest_size()
    for i in range(count):
        data = mutate(rng, corpus)
        own = int.from_bytes(data[4:6], "big")
        codec = codecs[own] if own in codecs else codecs[manifest[0].model_id]
        try:
            outcome, seconds = _timed_decode(codec, data)
            if seconds > _limit(outcome):
                # A slow moment of the machine is not the stream's doing: what a stream costs comes
                # again, its grid's schedule too, which is remembered otherwise.
                make_schedule.cache_clear()
                seconds = min(seconds, _timed_decode(codec, data)[1])
        except Exception as error:
            raise FaultError(f"stream {i} of seed {seed}: {error!r}: {data.hex()}") from error
        report.memory = _largest_size() - before
        if outcome == "decoded":
            report.slowest_decoding = max(report.slowest_decoding, seconds)
        else:
            report.slowest_failure = max(report.slowest_failure, seconds)
        if seconds > _limit(outcome) or report.memory > MAX_BYTES:
            raise FaultError(
                f"stream {i} of seed {seed} took {seconds:.2f} s and {report.memory} bytes "
                f"({outcome}): {data.hex()}"
            )
        report.outcomes["decoded" if outcome == "decoded" else _kind(outcome)] += 1
        if progress is not None:
            progress(i + 1)
    return report


def _kind(message: str) -> str:
    """The part of a message that does not depend on the stream's values."""
    words = re.sub(r"(?<=magic) .*", "", message.split(":")[0].split("(")[0]).split()
    return " ".join(word for word in words if not any(c.isdigit() for c in word))
