"""Every stream that was ever frozen decodes to what it was made of, and is made again alike.

Where a test here fails, streams in the wild no longer decode: mend the code, not the files.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from percov2.bitstream import Stream
from percov2.inspection import describe
from percov2.model_store import ModelSummary
from tests.golden.store import (
    FOLDER,
    MODEL,
    STREAMS,
    GoldenStream,
    encode,
    golden_codec,
    read_manifest,
    read_tokens,
)

STREAMS_THERE = read_manifest()
every_stream = pytest.mark.parametrize("stream", STREAMS_THERE, ids=lambda stream: stream.name)


def test_all_kinds_of_streams_are_there() -> None:
    assert len(STREAMS_THERE) >= 12
    assert {stream.schedule for stream in STREAMS_THERE} == {
        "quincunx",
        "qlds",
        "var",
        "checkerboard",
    }
    assert {stream.uniform for stream in STREAMS_THERE} == {True, False}
    assert {bool(stream.caption) for stream in STREAMS_THERE} == {True, False}
    assert {stream.path for stream in STREAMS_THERE} == set(STREAMS.iterdir())
    assert set(read_tokens()) == {stream.name for stream in STREAMS_THERE}


@every_stream
def test_tokens_and_caption_decode(stream: GoldenStream) -> None:
    codec, data = golden_codec(stream.schedule), stream.path.read_bytes()
    np.testing.assert_array_equal(codec.decode_tokens(data), read_tokens()[stream.name])
    described = describe(data, codec.summary)
    assert described["caption"] == stream.caption
    assert (described["width"], described["height"]) == (stream.width, stream.height)
    assert described["steps_sent"] == stream.steps
    assert described["entropy"] == ("uniform" if stream.uniform else "model")


@every_stream
def test_tokens_and_caption_give_the_same_bytes_again(stream: GoldenStream) -> None:
    codec = golden_codec(stream.schedule)
    data = encode(codec, stream, read_tokens()[stream.name])
    assert data.hex() == stream.path.read_bytes().hex()


@every_stream
def test_the_model_id_is_the_frozen_one(stream: GoldenStream) -> None:
    assert golden_codec(stream.schedule).config.model_id == stream.model_id
    assert Stream.from_bytes(stream.path.read_bytes()).model_id == stream.model_id


def test_the_frozen_model_is_complete_and_small() -> None:
    assert ModelSummary.read(MODEL).schedule == "quincunx"
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.suffix != ".pyc") < 500_000


def test_a_frozen_stream_becomes_a_picture() -> None:
    stream = next(stream for stream in STREAMS_THERE if stream.name == "odd")
    picture = golden_codec(stream.schedule).decompress(stream.path.read_bytes(), steps=1)
    assert picture.size == (stream.width, stream.height)


@pytest.mark.slow
def test_what_is_there_is_not_replaced_by_accident() -> None:
    before = {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.golden.make"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert all(path.read_bytes() == content for path, content in before.items())
