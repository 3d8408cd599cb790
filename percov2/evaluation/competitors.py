"""Conventional formats at a given number of bytes, as users would make them.

At a few hundred bytes a picture no conventional format can keep all pixels, so users reduce the
picture first. Every scale of `SCALES` is tried with the highest quality whose file is not larger
than asked for; of the three that have the highest PSNR after enlarging, the one with the highest
MS-SSIM is taken (below 176 pixels a side, that with the highest PSNR). Reducing and enlarging are
Lanczos. The size of the original is not stored, in the format's favour. If no setting fits, the
smallest file of all is taken and marked.
"""

from __future__ import annotations

import io
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, features
from pytorch_msssim import ms_ssim
from torch import Tensor

from percov2.data.transforms import image_to_tensor
from percov2.evaluation.codecs import Candidate, CodecInfo, Encoded, make_slug
from percov2.evaluation.pixel_metrics import MS_SSIM_SIDE
from percov2.evaluation.weights import AbsentError

SCALES = (1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
_MIN_REDUCED_SIDE = 8
_COMPARED = 3


class Format(ABC):
    """A file format with a quality.

    Attributes:
        name: for people.
        suffix: of files.
        qualities: how many there are; a higher number is a better and larger picture.
        settings: what is not searched for, for people.
    """

    name: str
    suffix: str
    qualities: int
    settings: str

    @abstractmethod
    def encode(self, image: Image.Image, quality: int) -> bytes:
        """RGB picture to a file, quality 0 to ``qualities`` - 1."""

    @abstractmethod
    def decode(self, data: bytes) -> Image.Image:
        """File to RGB picture."""


class PillowFormat(Format):
    """A format that Pillow writes and reads.

    Args:
        name: see `Format`.
        suffix: see `Format`.
        pillow: Pillow's name of the format.
        qualities: see `Format`.
        options: of Pillow for a quality.
        settings: see `Format`.
    """

    def __init__(
        self,
        name: str,
        suffix: str,
        pillow: str,
        *,
        qualities: int,
        options: Callable[[int], dict[str, object]],
        settings: str,
    ) -> None:
        self.name, self.suffix, self.qualities = name, suffix, qualities
        self.settings = f"Pillow, {settings}"
        self._pillow, self._options = pillow, options

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """See `Format`."""
        file = io.BytesIO()
        image.save(file, self._pillow, **self._options(quality))
        return file.getvalue()

    def decode(self, data: bytes) -> Image.Image:
        """See `Format`."""
        with Image.open(io.BytesIO(data), formats=[self._pillow]) as image:
            return image.convert("RGB")


class JpegXl(Format):
    """JPEG XL by imagecodecs (libjxl): distance 25 to 0.1, evenly in its logarithm.

    Raises:
        AbsentError: imagecodecs is not installed, or without JPEG XL.
    """

    name, suffix, qualities = "JPEG XL", ".jxl", 65
    settings = "imagecodecs, effort 7"

    def __init__(self) -> None:
        try:
            import imagecodecs
        except ModuleNotFoundError as error:
            raise AbsentError(f"{error} (pip install '.[evaluation]')") from error
        if not imagecodecs.JPEGXL.available:
            raise AbsentError("imagecodecs was built without JPEG XL")
        self._library = imagecodecs

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """See `Format`."""
        distance = 25 * (0.1 / 25) ** (quality / (self.qualities - 1))
        return bytes(self._library.jpegxl_encode(np.asarray(image), distance=distance, effort=7))

    def decode(self, data: bytes) -> Image.Image:
        """See `Format`."""
        return Image.fromarray(self._library.jpegxl_decode(data)).convert("RGB")


class Heic(Format):
    """HEIC (HEVC by x265) by pillow-heif.

    Raises:
        AbsentError: pillow-heif is not installed.
    """

    name, suffix, qualities = "HEIC", ".heic", 101
    settings = "pillow-heif, quality 0 to 100, preset slow, one thread, 4:2:0"

    def __init__(self) -> None:
        try:
            import pillow_heif
        except ModuleNotFoundError as error:
            raise AbsentError(f"{error} (pip install '.[heic]')") from error
        self._library = pillow_heif

    def encode(self, image: Image.Image, quality: int) -> bytes:
        """See `Format`."""
        file = io.BytesIO()
        # With a pool of threads x265 is several times slower on such small pictures, and its files'
        # sizes differ from one machine to another.
        options = {"preset": "slow", "x265:pools": "none"}
        self._library.from_pillow(image).save(file, quality=quality, chroma=420, enc_params=options)
        return file.getvalue()

    def decode(self, data: bytes) -> Image.Image:
        """See `Format`."""
        image: Image.Image = self._library.open_heif(io.BytesIO(data)).to_pillow()
        return image.convert("RGB")


def _jpeg2000_options(quality: int) -> dict[str, object]:
    # Compression ratios 20000 to 5, evenly in their logarithm.
    ratio = 20000 * (5 / 20000) ** (quality / 64)
    return {
        "quality_mode": "rates",
        "quality_layers": [ratio],
        "irreversible": True,
        "mct": 1,
        "no_jp2": True,
    }


def _jpeg() -> Format:
    return PillowFormat(
        "JPEG",
        ".jpg",
        "JPEG",
        qualities=95,
        options=lambda quality: {"quality": quality + 1, "optimize": True, "progressive": True},
        settings="quality 1 to 95, progressive, optimised tables, 4:2:0",
    )


def _jpeg2000() -> Format:
    if not features.check("jpg_2000"):
        raise AbsentError("Pillow was built without JPEG 2000")
    return PillowFormat(
        "JPEG 2000",
        ".j2k",
        "JPEG2000",
        qualities=65,
        options=_jpeg2000_options,
        settings="ratio 20000 to 5, irreversible, bare code stream",
    )


def _webp() -> Format:
    if not features.check("webp"):
        raise AbsentError("Pillow was built without WebP")
    return PillowFormat(
        "WebP",
        ".webp",
        "WEBP",
        qualities=101,
        options=lambda quality: {"quality": quality, "method": 6},
        settings="quality 0 to 100, method 6",
    )


def _avif() -> Format:
    if not features.check("avif"):
        raise AbsentError("Pillow was built without AVIF")
    return PillowFormat(
        "AVIF",
        ".avif",
        "AVIF",
        qualities=101,
        options=lambda quality: {"quality": quality, "speed": 4, "max_threads": 1},
        settings="quality 0 to 100, speed 4, 4:2:0",
    )


FORMATS: dict[str, Callable[[], Format]] = {
    "jpeg": _jpeg,
    "jpeg2000": _jpeg2000,
    "webp": _webp,
    "avif": _avif,
    "jxl": JpegXl,
    "heic": Heic,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    data: bytes
    seconds: float


class FormatCandidate(Candidate):
    """A format at the bytes of a stream, see the top of this file.

    Args:
        image_format: the format.
        anchor: name of the stream to be matched.
        rate: ``same`` or a factor, ``2x``.
        family: key of the format.
    """

    def __init__(self, image_format: Format, *, anchor: str, rate: str, family: str) -> None:
        self._format = image_format
        self.rate = anchor, parse_rate(rate)
        how = "same bytes as" if rate == "same" else f"{rate} the bytes of"
        model = anchor.removeprefix("percov2 ")
        self.info = CodecInfo(
            codec=image_format.name,
            family=family,
            setting={"anchor": anchor, "rate": rate},
            label=f"{image_format.name}, {how} {anchor}",
            slug=make_slug(family, model, rate),
            suffix=image_format.suffix,
            identity=image_format.settings,
        )
        self.stream = self.info.slug

    def encode(self, image: Image.Image, caption: str, target: int | None) -> Encoded:
        """See `Candidate`."""
        assert target is not None
        fitting, smallest = [], None
        for scale in SCALES:
            reduced, seconds = _reduce(image, scale)
            worst = self._try(reduced, 0, seconds)
            if smallest is None or len(worst.data) < len(smallest.data):
                smallest = worst
            if len(worst.data) > target:
                break  # larger pictures have larger files
            fitting.append(self._highest(reduced, worst, target, seconds))
        assert smallest is not None
        if not fitting:
            return Encoded(data=smallest.data, at_smallest=True, seconds=smallest.seconds)
        started = time.perf_counter()
        best, decoding = self._best(image, fitting)
        other = time.perf_counter() - started - decoding
        return Encoded(data=best.data, seconds=best.seconds, other_seconds=other)

    def _try(self, reduced: Image.Image, quality: int, seconds: float) -> _Trial:
        started = time.perf_counter()
        data = self._format.encode(reduced, quality)
        return _Trial(data=data, seconds=seconds + time.perf_counter() - started)

    def _highest(self, reduced: Image.Image, worst: _Trial, target: int, seconds: float) -> _Trial:
        """The best quality of a scale that fits, by halving."""
        fits, too_large, best = 0, self._format.qualities, worst
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            trial = self._try(reduced, middle, seconds)
            if len(trial.data) <= target:
                fits, best = middle, trial
            else:
                too_large = middle
        return best

    def _best(self, image: Image.Image, trials: Sequence[_Trial]) -> tuple[_Trial, float]:
        """The trial nearest to the original, and the seconds that decoding all of them took."""
        if len(trials) == 1:
            return trials[0], 0.0
        original, decoding = _pixels(image), 0.0
        compared: list[tuple[float, int, Tensor]] = []
        for number, trial in enumerate(trials):
            started = time.perf_counter()
            restored = self.decode(trial.data, image.size)
            decoding += time.perf_counter() - started
            pixels = _pixels(restored)
            error = float((pixels - original).square().mean())
            compared.append((error, number, pixels))
        nearest = sorted(compared, key=lambda entry: entry[0])[:_COMPARED]
        if min(image.size) < MS_SSIM_SIDE:
            return trials[nearest[0][1]], decoding
        # Not by torchmetrics, as the metric is: its filters are not separated, which takes three
        # times as long. The values differ by what the two do at odd sizes and borders.
        values = [float(ms_ssim(original, pixels, data_range=1.0)) for _, _, pixels in nearest]
        return trials[nearest[values.index(max(values))][1]], decoding

    def decode(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        """See `Candidate`."""
        image = self._format.decode(data)
        return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def parse_rate(rate: str) -> float:
    """``same`` or a factor such as ``2x`` to a number.

    Raises:
        ValueError: neither.
    """
    try:
        factor = 1.0 if rate == "same" else float(rate.removesuffix("x"))
    except ValueError:
        factor = 0.0
    if not 0 < factor < float("inf") or not (rate == "same" or rate.endswith("x")):
        raise ValueError(f"rate {rate!r}: say same, or a factor such as 2x")
    return factor


def _pixels(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return ((image_to_tensor(image)[None] + 1) / 2).clamp(0, 1)


def _reduce(image: Image.Image, scale: float) -> tuple[Image.Image, float]:
    if scale == 1:
        return image, 0.0
    started = time.perf_counter()
    width, height = (
        min(length, max(_MIN_REDUCED_SIDE, round(length * scale))) for length in image.size
    )
    reduced = image.resize((width, height), Image.Resampling.LANCZOS)
    return reduced, time.perf_counter() - started
