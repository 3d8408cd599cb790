"""Pictures in and out: anything Pillow opens becomes 8-bit sRGB, and results become PNG.

The codec knows one kind of picture: RGB, 8 bits a channel, sRGB, upright, opaque, each side
`MIN_SIDE` to `MAX_SIDE` pixels. Whatever is changed on the way there is told in notes.
"""

from __future__ import annotations

import io
import stat
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from percov2.bitstream import MAX_SIDE, MIN_SIDE
from percov2.files import atomic_path
from percov2.messages import one_line

READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "AVIF")
"""An allow-list: Pillow's other readers include ones that run external programs (EPS)."""

# What Pillow raises on damaged files besides OSError: SyntaxError for broken headers and chunks,
# EOFError for missing frames, ValueError, struct.error, LookupError and TypeError for header fields
# that run out or have the wrong type, ArithmeticError for absurd rationals and offsets, zlib.error
# for broken text chunks, RuntimeError from the AVIF and WebP decoders.
_DAMAGE = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    struct.error,
    LookupError,
    TypeError,
    ArithmeticError,
    zlib.error,
    RuntimeError,
)

_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
_GREY_MODES = ("1", "L", "LA", "La")
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}
_MAX_PNG_KEY = 79
# TIFF's tags.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339


def check_size(width: int, height: int) -> None:
    """Refuse a size that the codec cannot store.

    Raises:
        ValueError: A side is outside `MIN_SIDE` to `MAX_SIDE` pixels.
    """
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise ValueError(
            f"size {width}x{height}: each side must be {MIN_SIDE} to {MAX_SIDE} pixels, "
            "resize or crop the picture first"
        )


def read_image(path: Path) -> tuple[Image.Image, list[str]]:
    """Read a picture file as 8-bit sRGB.

    The size is checked before any pixel is decoded, so a decompression bomb costs nothing.

    Returns:
        The picture (mode `RGB`) and notes on what was converted, one sentence each.

    Raises:
        ValueError: The file is missing, no picture, damaged, or of a size the codec cannot store.
    """
    with _named_damage(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: is a folder or a device, give a picture file")
    if status.st_size == 0:
        raise ValueError(f"{path}: the file is empty, fetch it again")
    with _named_damage(path):
        picture = Image.open(path, formats=READABLE_FORMATS)
    with picture:
        try:
            check_size(*picture.size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        notes: list[str] = []
        with _named_damage(path):
            if getattr(picture, "is_animated", False):
                picture.seek(0)
            picture.load()
            if picture.format == "PNG":
                _mend_png(picture, path, notes)
        try:
            image, more = to_srgb(picture)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return image, notes + more


def to_srgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Bring a picture of any mode to upright, opaque, 8-bit sRGB.

    In this order: the frame that it shows; grey of more than 8 bits scaled; colours converted by
    the embedded ICC profile (perceptual intent) or, without one, by Pillow's default for the mode;
    alpha composited on white; EXIF orientation applied.

    Returns:
        A new picture (mode `RGB`, no metadata) and notes, one short sentence for each change that
        loses or interprets something.

    Raises:
        ValueError: Floating-point pixels that are not finite.
    """
    notes: list[str] = []
    image.load()
    if getattr(image, "is_animated", False):
        which = "the first" if image.tell() == 0 else f"number {image.tell() + 1}"
        notes.append(f"only {which} of several frames or pages is kept")
    if image.mode not in _WIDE_MODES and max(_tiff_tag(image, _BITS_PER_SAMPLE, (8,))) > 8:
        notes.append("reduced to 8 bits")
    colour, alpha = _split_alpha(image, notes)
    result = _colour_to_srgb(colour, image.info.get("icc_profile"), notes)
    if alpha is not None and alpha.getextrema() != (255, 255):
        result = Image.composite(result, Image.new("RGB", result.size, "white"), alpha)
        notes.append("alpha composited on white")
    transpose = _transpose_of(image, notes)
    if transpose is not None:
        result = result.transpose(transpose)
    result.info = {}  # orientation and profile are applied: leave nothing to be applied twice
    return result, notes


def write_png(path: Path, image: Image.Image, metadata: Mapping[str, str]) -> None:
    """Write an sRGB picture as PNG, whole or not at all.

    Args:
        path: The file to write or replace.
        image: A picture of mode `RGB`.
        metadata: Text chunks by keyword; iTXt (UTF-8) where Latin-1 does not suffice.

    Raises:
        ValueError: Wrong mode, a keyword that PNG does not allow, or text it cannot hold.
        OSError: The file cannot be written.
    """
    if image.mode != "RGB":
        raise ValueError(f"picture of mode {image.mode}: convert it to RGB first")
    chunks = PngInfo()
    chunks.add(b"sRGB", bytes([ImageCms.Intent.PERCEPTUAL]))
    for key, text in metadata.items():
        if not (key.isascii() and key.isprintable() and 0 < len(key) <= _MAX_PNG_KEY):
            raise ValueError(
                f"metadata keyword {key!r}: must be 1 to {_MAX_PNG_KEY} printable ASCII characters"
            )
        if "\0" in text:
            raise ValueError(f"metadata {key!r} contains a NUL character: remove it")
        chunks.add_text(key, text)  # chooses iTXt where Latin-1 does not suffice
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)


@contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Turn whatever Pillow raises on a bad file into one ValueError that names the file."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path}: not a picture, or damaged at its beginning: give one of "
            f"{', '.join(READABLE_FORMATS)}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path}: {one_line(error)}: each side must be {MIN_SIDE} to {MAX_SIDE} pixels, "
            "resize or crop the picture first"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
            raise ValueError(f"{path}: cannot be opened: {error.strerror}") from error
        raise ValueError(
            f"{path}: cannot be decoded as a picture ({one_line(error)}): "
            "damaged or truncated, fetch it again or save it anew"
        ) from error


def _mend_png(picture: Image.Image, path: Path, notes: list[str]) -> None:
    """What Pillow makes of bit depths: grey of less than 8 bits is scaled, the transparent grey is
    not; colours of 16 bits lose their low byte, the transparent colour the high one."""
    with path.open("rb") as file:
        depth, colours = file.read(26)[24:]  # of the first chunk, IHDR
    grey = colours == 0
    clear = picture.info.get("transparency")
    if grey and depth < 8 and isinstance(clear, int) and picture.mode == "L":
        picture.info["transparency"] = clear * 255 // ((1 << depth) - 1)
    if depth == 16 and not grey:
        notes.append("reduced to 8 bits")
        if picture.info.pop("transparency", None) is not None:
            notes.append("a transparent colour of 16 bits is ignored")


def _tiff_tag(image: Image.Image, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
    """Values of a tag of a TIFF; of other pictures the default."""
    tags = getattr(image, "tag_v2", None)
    if image.format != "TIFF" or tags is None:
        return default
    found = tags.get(tag, default)
    return found if isinstance(found, tuple) else (found,)


def _split_alpha(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Separate colour (mode L, RGB, CMYK or LAB) and alpha (mode L, None if there is none)."""
    mode = image.mode
    if mode in _WIDE_MODES:
        return _split_wide(image, notes)
    if mode in ("CMYK", "LAB"):
        return image, None
    if mode in ("YCbCr", "HSV"):
        notes.append(f"converted from {mode}")
        return image.convert("RGB"), None
    grey = mode in _GREY_MODES
    if not image.has_transparency_data:
        return image.convert("L" if grey else "RGB"), None
    *colours, alpha = image.convert("LA" if grey else "RGBA").split()
    return Image.merge("L" if grey else "RGB", colours), alpha


def _split_wide(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Scale grey of more than 8 bits to 8 bits.

    Integers are samples of 16 bits, or of as many as a TIFF says: black is 0, white 65535. For
    floats white is the least of 1, 255 and 65535 that samples exceed by no more than half, as
    overshoot of a filter does; what lies outside is clipped. Samples farther out are stretched
    instead: black is the least sample, white the greatest.
    """
    samples = np.asarray(image)
    (bits, *_), (kind, *_) = (
        _tiff_tag(image, tag, default)
        for tag, default in ((_BITS_PER_SAMPLE, (16,)), (_SAMPLE_FORMAT, (1,)))
    )
    if image.format == "TIFF" and image.mode == "I" and (bits, kind) == (32, 1):
        samples = samples.view(np.uint32)  # Pillow takes them for signed
    least, greatest = float(samples.min()), float(samples.max())
    if not np.isfinite([least, greatest]).all():
        raise ValueError("picture has samples that are NaN or infinite: replace them by numbers")
    if image.mode == "F":
        whites = [w for w in (1.0, 255.0, 65535.0) if -w / 2 <= least and greatest <= 1.5 * w]
    else:
        white = float((1 << min(bits, 16)) - 1)
        whites = [white] if least >= 0 and greatest <= white else []
    low, high = (0.0, whites[0]) if whites else (least, greatest)
    scaled = samples.astype(np.float64)
    scaled -= low
    scaled *= 255.0 / (high - low if high > low else 1.0)
    if least < low or greatest > high:
        notes.append("samples beyond black and white are clipped")
        np.clip(scaled, 0.0, 255.0, out=scaled)
    if _tiff_tag(image, _PHOTOMETRIC, (1,)) == (0,):  # WhiteIsZero
        np.subtract(255.0, scaled, out=scaled)
    notes.append(f"grey reduced to 8 bits: black is {low:g}, white is {high:g}")
    grey = Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey, None
    return grey, Image.fromarray(np.where(samples == clear, 0, 255).astype(np.uint8))


def _colour_to_srgb(colour: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """Convert opaque colour (mode L, RGB, CMYK or LAB) to RGB, by its ICC profile if it has one."""
    if profile is not None:
        converted = _apply_profile(colour, profile)
        if converted is not None:
            if colour.mode in ("CMYK", "LAB"):
                notes.append(f"converted from {colour.mode} by its colour profile")
            elif _differs(colour.convert("RGB"), converted):
                notes.append("converted to sRGB by its colour profile")
            return converted
        notes.append("unusable colour profile ignored")
    if colour.mode in ("CMYK", "LAB"):
        notes.append(f"converted from {colour.mode} without a colour profile")
    return colour.convert("RGB")


def _apply_profile(colour: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert by an ICC profile; None if the profile is broken or made for other colours."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES.get(source.profile.xcolor_space)
        if colour.mode == "L" and mode == "RGB":
            colour = colour.convert("RGB")
        if colour.mode != mode:
            return None
        return ImageCms.profileToProfile(
            colour,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.PERCEPTUAL,
            outputMode="RGB",
        )
    except (OSError, TypeError, ValueError, ImageCms.PyCMSError):
        return None


def _differs(first: Image.Image, second: Image.Image) -> bool:
    """Whether two RGB pictures differ by more than the rounding of an sRGB to sRGB conversion."""
    return bool(np.asarray(ImageChops.difference(first, second)).max() > 1)


def _transpose_of(image: Image.Image, notes: list[str]) -> Image.Transpose | None:
    """The transpose that the EXIF orientation asks for."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except _DAMAGE:
        notes.append("unreadable EXIF data ignored")
        return None
    return _TRANSPOSES.get(orientation)
