"""From the bytes of a sample to tensors and text: captions, filters, crops, batches."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, cast

from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from percov2.data.faults import FaultError, FilteredError
from percov2.data.filters import Filters
from percov2.data.transforms import CropTransform
from percov2.files import IMAGE_SUFFIXES
from percov2.images import READABLE_FORMATS, to_srgb
from percov2.messages import one_line

RawSample = Mapping[str, Any]
"""What a shard holds of a sample: ``__key__`` and ``__url__`` (texts), then bytes by suffix."""


class Records(Protocol):
    """Raw samples that can be read one by one; reading one may raise OSError."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, index: int, /) -> RawSample:
        """One of them."""


MAX_PIXELS = 2**26
"""Pictures of more pixels (8192x8192) are not decoded: 200 MB in one worker."""

_NO_CAPTION = "empty"
_JSON_PREFIX = "json."


class StreamInfo(TypedDict):
    """Where a worker of the stream stands after a batch, and what it met on the way.

    worker: its number; workers: how many there are in this process; position: where it reads on;
    faults and filtered: counts by kind since the batch before.
    """

    worker: int
    workers: int
    position: list[int]
    faults: dict[str, int]
    filtered: dict[str, int]


class Batch(TypedDict, total=False):
    """What a DataModule yields. B samples; H = 8 h and W = 8 w pixels.

    image: (B, 3, H, W) float32 in [-1, 1]; absent in a cache made without pictures.
    latents: (B, C, h, w) float32, scaled as `Autoencoder.encode` does; only from a cache.
    caption: B texts, maybe empty.
    key: B sample names.
    text_embeddings: (B, L, D) float16; only from a cache with text.
    text_pooled: (B, P) float16; only from a cache with text.
    empty_embeddings: (L, D) float16, of the empty caption; only from a cache with text.
    empty_pooled: (P,) float16, of the empty caption; only from a cache with text.
    stream: for the DataModule, which takes it out before a stage sees the batch.
    """

    image: Tensor
    latents: Tensor
    caption: list[str]
    key: list[str]
    text_embeddings: Tensor
    text_pooled: Tensor
    empty_embeddings: Tensor
    empty_pooled: Tensor
    stream: StreamInfo


Sample = dict[str, Any]
"""One sample, with the keys of `Batch` and without its batch axis."""

Decoder = Callable[[RawSample, random.Random | None], Sample]
"""Turns bytes into a sample. With a random source it augments; with None it takes the one fixed
version (validation). Raises `FaultError` and `FilteredError`."""


def seeded_rng(*parts: object) -> random.Random:
    """A random source that depends on the parts alone, not on process or platform."""
    # Names in archives and folders need not be UTF-8: what is not comes as surrogates.
    return random.Random("/".join(map(str, parts)).encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, kw_only=True)
class CaptionMix:
    """Where captions come from: sources, one of which is drawn per sample.

    Attributes:
        weights: by source: a suffix of the sample's files (``txt``), a field of its JSON
            (``json.NAME``: a text, or a list of texts of which one is drawn), or ``empty`` for
            no caption. A sample that lacks some of the sources draws among the others.

    Raises:
        ValueError: no source, a negative weight or weights that are all zero.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.weights or min(self.weights.values()) < 0 or not sum(self.weights.values()):
            raise ValueError(
                f"captions {dict(self.weights)}: give at least one source a positive weight, "
                "for instance {txt: 0.9, empty: 0.1}"
            )

    @property
    def needs_metadata(self) -> bool:
        """Whether the JSON is asked for anything."""
        return any(source.startswith(_JSON_PREFIX) for source in self.weights)

    def draw(
        self, raw: RawSample, metadata: Mapping[str, Any], rng: random.Random | None
    ) -> tuple[str, bool]:
        """A caption, and whether it was written by a source (False: ``empty`` was drawn).

        Without a random source: that of the greatest weight among the sources present.

        Raises:
            FaultError: none of the sources is present, or the one drawn cannot be decoded.
        """
        wanted = {source: weight for source, weight in self.weights.items() if weight > 0}
        written = [s for s in wanted if s != _NO_CAPTION and _has(raw, metadata, s)]
        if not written and set(wanted) != {_NO_CAPTION}:
            raise FaultError("missing_caption", f"none of {', '.join(wanted)} is present")
        present = {s: w for s, w in wanted.items() if s == _NO_CAPTION or s in written}
        if rng is None:
            source = max(written or present, key=present.__getitem__)
        else:
            source = rng.choices(list(present), list(present.values()))[0]
        if source == _NO_CAPTION:
            return "", False
        return _text_of(raw, metadata, source, rng), True


ORIGINAL_CAPTIONS = CaptionMix(weights={"txt": 1.0})
"""The caption that came with the picture."""


def make_captions(weights: dict[str, float] | None) -> CaptionMix:
    """`CaptionMix` from a configuration's mapping; None is the original caption."""
    return ORIGINAL_CAPTIONS if weights is None else CaptionMix(weights=dict(weights))


def _has(raw: RawSample, metadata: Mapping[str, Any], source: str) -> bool:
    if source.startswith(_JSON_PREFIX):
        return metadata.get(source.removeprefix(_JSON_PREFIX)) not in (None, [])
    return source in raw


def _text_of(
    raw: RawSample, metadata: Mapping[str, Any], source: str, rng: random.Random | None
) -> str:
    if not source.startswith(_JSON_PREFIX):
        return _decode(raw[source], source).strip()
    value = metadata[source.removeprefix(_JSON_PREFIX)]
    if isinstance(value, list):
        value = value[0] if rng is None else rng.choice(value)
    if not isinstance(value, str):
        raise FaultError("undecodable_text", f"{source} holds {value!r}, not a text")
    # JSON can hold one half of a surrogate pair.
    return _decode(value.encode("utf-8", "surrogatepass"), source).strip()


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FaultError("undecodable_text", f"{name} is not UTF-8 ({one_line(error)})") from error


def read_metadata(raw: RawSample) -> dict[str, Any]:
    """The JSON of a sample, {} if it has none.

    Raises:
        FaultError: it is not a JSON object.
    """
    if "json" not in raw:
        return {}
    try:
        metadata = json.loads(_decode(raw["json"], "json"))
    except ValueError as error:
        raise FaultError("undecodable_text", f"json: {one_line(error)}") from error
    if not isinstance(metadata, dict):
        raise FaultError("undecodable_text", f"json is a {type(metadata).__name__}, not an object")
    return metadata


def image_bytes(raw: RawSample) -> bytes:
    """The file of a sample that is a picture, by its suffix.

    Raises:
        FaultError: there is none.
    """
    for suffix, data in raw.items():
        if f".{suffix}" in IMAGE_SUFFIXES:
            return cast(bytes, data)
    raise FaultError("missing_image", "no file with the suffix of a picture")


@dataclass(frozen=True, kw_only=True)
class PictureDecoder:
    """Picture and caption of a sample; a `Decoder`.

    Attributes:
        crop: of the picture.
        captions: of which one is drawn.
        filters: what is refused.
    """

    crop: CropTransform
    captions: CaptionMix
    filters: Filters

    def __call__(self, raw: RawSample, rng: random.Random | None) -> Sample:
        """See `Decoder`. The cheap checks come before the picture is decoded."""
        asked = self.captions.needs_metadata or self.filters.needs_metadata
        metadata = read_metadata(raw) if asked else {}
        caption, written = self.captions.draw(raw, metadata, rng)
        if written:
            self.filters.check_caption(caption)
        self.filters.check_metadata(metadata)
        picture = decode_picture(image_bytes(raw), self.filters)
        return {"image": self.crop(picture, rng), "caption": caption, "key": raw["__key__"]}


def picture_decoder(
    *,
    crop: int,
    max_zoom: float,
    color_jitter: float,
    captions: dict[str, float] | None,
    filters: Filters,
) -> PictureDecoder:
    """`PictureDecoder` from the fields of a configuration.

    Args:
        crop: side of the square crops in pixels.
        max_zoom: see `CropTransform`.
        color_jitter: likewise.
        captions: weights of caption sources, see `CaptionMix`; None is ``{txt: 1}``.
        filters: what is refused.

    Raises:
        ValueError: a value out of range.
    """
    return PictureDecoder(
        crop=CropTransform(size=crop, max_zoom=max_zoom, color_jitter=color_jitter),
        captions=make_captions(captions),
        filters=filters,
    )


def decode_picture(data: bytes, filters: Filters) -> Image.Image:
    """Bytes to an sRGB picture.

    Raises:
        FaultError: damaged, or more than `MAX_PIXELS`.
        FilteredError: of a size that the filters refuse; found before any pixel is decoded.
    """
    with _counted_damage(), io.BytesIO(data) as file:
        picture = Image.open(file, formats=READABLE_FORMATS)
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise FaultError("oversized_image", f"{width}x{height} is above {MAX_PIXELS} pixels")
        filters.check_size(width, height)
        return to_srgb(picture)[0]


@contextmanager
def _counted_damage() -> Iterator[None]:
    """Turn whatever Pillow raises on a damaged picture into a `FaultError`."""
    try:
        yield
    except (FaultError, FilteredError, MemoryError):
        raise
    except Exception as error:  # nearly anything: OSError, SyntaxError, struct.error, ...
        raise FaultError("corrupt_image", one_line(error)) from error


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack tensors, list the rest; of the stream the last position and the sum of the counts."""
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = default_collate(values) if isinstance(first, Tensor) else values
    if "stream" in batch:
        infos: list[StreamInfo] = batch["stream"]
        counts = {
            field: dict(sum((Counter(info[field]) for info in infos), Counter()))
            for field in ("faults", "filtered")
        }
        batch["stream"] = {**infos[-1], **counts}
    return cast(Batch, batch)
