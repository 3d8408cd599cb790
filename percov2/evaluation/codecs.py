"""Codecs under evaluation: each turns a picture into the bytes of a file, and back."""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from percov2.codec import Codec
from percov2.inspection import describe, png_metadata
from percov2.messages import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecInfo:
    """What identifies a codec with its setting.

    Attributes:
        codec: name; the settings of one codec make a curve.
        family: ``percov2``, the name of a format, ``compressai`` or ``external``.
        setting: what distinguishes this setting.
        label: for people.
        slug: for files.
        suffix: of its files.
        identity: whatever else changes the result; a resumed run must find the same.
    """

    codec: str
    family: str
    setting: dict[str, Any]
    label: str
    slug: str
    suffix: str
    identity: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A picture as a file.

    Attributes:
        data: the file's bytes.
        at_smallest: the file is larger than asked for, and the codec can make none smaller.
        seconds: what a user waits who knows the setting: without the search for it. None if
            nothing was searched for.
        other_seconds: spent on comparing settings, which is not the codec's own work.
    """

    data: bytes
    at_smallest: bool = False
    seconds: float | None = None
    other_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Details:
    """What a codec tells of a file.

    Attributes:
        columns: more columns of the table, by name.
        metadata: text to be written into the reconstruction's PNG.
    """

    columns: dict[str, float] = field(default_factory=dict)
    metadata: PngInfo | None = None


class Candidate(ABC):
    """A codec with its setting.

    Attributes:
        info: see `CodecInfo`.
        stream: candidates of one stream name share their files: only decoding differs.
        rate: the stream whose size is to be matched and by what factor, None for a fixed setting.
    """

    info: CodecInfo
    stream: str
    rate: tuple[str, float] | None = None

    @abstractmethod
    def encode(self, image: Image.Image, caption: str, target: int | None) -> Encoded:
        """Picture to file.

        Args:
            image: RGB.
            caption: to store; "" for none. Codecs that know no captions ignore it.
            target: bytes not to exceed, given where ``rate`` is.

        Raises:
            ValueError, OSError, RuntimeError: the codec fails on this picture.
        """

    @abstractmethod
    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        """File to RGB picture.

        Args:
            data: the file's bytes.
            size: width and height of the original. Formats that store a reduced picture do not
                know it; it is given to them free of charge.
        """

    def details(self, data: bytes) -> Details:
        """What there is to tell of a file."""
        return Details()


def make_slug(*parts: str) -> str:
    """A name for files: lower case letters, digits, points and hyphens."""
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-")


class PercoCandidate(Candidate):
    """A percov2 model with sampling steps and guidance.

    Args:
        codec: the model.
        steps: None is the model's default.
        guidance: None is the model's default, which the slug then leaves out.
        store_captions: whether captions go into the stream.
    """

    def __init__(
        self, codec: Codec, *, steps: int | None, guidance: float | None, store_captions: bool
    ) -> None:
        config = codec.config
        self.codec, self.store_captions = codec, store_captions
        self.steps = config.default_steps if steps is None else steps
        self.guidance = config.default_guidance if guidance is None else guidance
        self.stream = f"percov2 {config.name}"
        chosen = [] if guidance is None else [f"g{guidance:g}"]
        self.info = CodecInfo(
            codec=self.stream,
            family="percov2",
            setting={"steps": self.steps, "guidance": self.guidance},
            label=f"{self.stream}, {counted(self.steps, 'step')}"
            + (f", guidance {guidance:g}" if guidance is not None else ""),
            slug=make_slug("percov2", config.name, str(self.steps), *chosen),
            suffix=".pcv2",
            identity=f"model {config.model_id}, weights {_digest(codec)}, "
            f"captions {store_captions}",
        )

    def encode(self, image: Image.Image, caption: str, target: int | None) -> Encoded:
        """See `Candidate`."""
        data = self.codec.compress(image, caption=caption if self.store_captions else "")
        return Encoded(data=data)

    def details(self, data: bytes) -> Details:
        """Where a stream's bytes go, what the entropy model saves, and PNG's text chunks."""
        described = describe(data, self.codec.summary)
        rows, cols = self.codec.summary.token_grid(described["width"], described["height"])
        codes = self.codec.components.tokenizer.quantizer.codebook_size
        uniform_bytes = rows * cols * math.log2(codes) / 8
        sizes, chunks = described["bytes"], PngInfo()
        for key, text in png_metadata(described).items():
            chunks.add_text(key, text)
        columns = {
            "header_bytes": sizes["header"],
            "caption_bytes": sizes["caption"],
            "token_bytes": sizes["tokens"],
            "token_saving_against_uniform": 1 - sizes["tokens"] / uniform_bytes,
        }
        return Details(columns=columns, metadata=chunks)

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        """See `Candidate`."""
        return self.codec.decompress(data, steps=self.steps, guidance=self.guidance)


def _digest(codec: Codec) -> str:
    """Hexadecimal digest of all that makes tokens and paints them.

    The model's id does not tell: it is of what reads a stream, and stays when a painter is
    finetuned.
    """
    import torch

    parts = codec.components.tokenizer.modules() | {
        "transformer": codec.components.transformer,
        "text_conditioner": codec.components.text_conditioner,
    }
    config = codec.config
    weights = config.rate_weight, config.color_weight, config.latent_weight
    settings = config.flow, config.tiling, config.sharpness, config.grain, *weights
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for part, module in sorted(parts.items()):
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{part}.{name}".encode())
            digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
