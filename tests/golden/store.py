"""Reads tests/golden: one frozen model, used with four schedules, and what its streams hold."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from percov2.codec import Codec
from percov2.components import CodecComponents, compute_model_id
from percov2.entropy.token_coder import Tokens

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
STREAMS = FOLDER / "streams"
MANIFEST = FOLDER / "manifest.json"
TOKENS = FOLDER / "tokens.npz"


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenStream:
    """What a stream holds; its tokens are in `TOKENS` under the same name.

    Attributes:
        name: of the file in `STREAMS`, without its suffix.
        schedule: of the model.
        model_id: of the model with this schedule.
        width: in pixels.
        height: in pixels.
        caption: empty if there is none.
        steps: groups that are in the stream.
        uniform: whether the tokens are coded without the masked model.
    """

    name: str
    schedule: str
    model_id: int
    width: int
    height: int
    caption: str
    steps: int
    uniform: bool

    @property
    def path(self) -> Path:
        """Where the stream is."""
        return STREAMS / f"{self.name}.pcv2"


def write_manifest(streams: list[GoldenStream]) -> None:
    text = json.dumps([asdict(stream) for stream in streams], indent=1, ensure_ascii=False)
    MANIFEST.write_text(text + "\n", encoding="utf-8")


def read_manifest() -> list[GoldenStream]:
    return [GoldenStream(**fields) for fields in json.loads(MANIFEST.read_text(encoding="utf-8"))]


@cache
def read_tokens() -> dict[str, Tokens]:
    """Tokens (r, c) of every stream, -1 where a group was not sent."""
    with np.load(TOKENS, allow_pickle=False) as archive:
        return {name: archive[name].astype(np.int64) for name in archive.files}


def with_schedule(components: CodecComponents, schedule: str) -> CodecComponents:
    """The same weights with another schedule, which is another model."""
    parts = components.tokenizer
    model_id = compute_model_id(parts.masked_transformer, parts.quantizer.codebook, schedule)
    config = replace(components.config, schedule=schedule, model_id=model_id)
    return replace(components, config=config)


@cache
def _components() -> CodecComponents:
    return CodecComponents.load(MODEL)


@cache
def golden_codec(schedule: str) -> Codec:
    """The frozen model with one of its schedules."""
    return Codec(with_schedule(_components(), schedule))


def encode(codec: Codec, stream: GoldenStream, tokens: Tokens) -> bytes:
    """Tokens and caption to a stream, without the networks that look at pixels."""
    return codec._write(
        tokens,
        (stream.width, stream.height),
        stream.caption,
        steps=stream.steps,
        uniform=stream.uniform,
    )
