from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageChops, ImageCms, ImageOps

from percov2.images import check_size, read_image, to_srgb, write_png

Array = npt.NDArray[Any]

SRGB_TO_XYZ_D50 = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)
P3_TO_XYZ_D50 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
GAMMA = 563 / 256


def photo(width: int = 40, height: int = 24) -> Image.Image:
    """A smooth colour picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (255 * x / width, 255 * y / height, 128 + 100 * np.sin(x / 7 + y / 5))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> Array:
    return np.asarray(image).astype(int)


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def reopened(image: Image.Image, format_: str, **options: Any) -> Image.Image:
    return Image.open(io.BytesIO(encoded(image, format_, **options)))


def icc_profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 ICC profile of the given colour space and tags."""
    table, body = b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content
    size = 132 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02400000, b"prtr", space, pcs)
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz_tag(values: Array) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(65536 * value) for value in values))


def gamma_tag(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))


def wide_gamut_profile() -> bytes:
    tags = {b"wtpt": xyz_tag(np.array([0.9642, 1.0, 0.8249]))}
    for index, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = xyz_tag(P3_TO_XYZ_D50[:, index])
        tags[name + b"TRC"] = gamma_tag(GAMMA)
    return icc_profile(b"RGB ", b"XYZ ", tags)


def ink_profile() -> bytes:
    """CMYK where any cyan ink prints as mid red: unlike every default conversion."""
    nodes = b""
    for node in range(16):  # cyan varies slowest
        paper_or_red = (128, 198, 168) if node & 8 else (255, 128, 128)
        nodes += bytes(paper_or_red) if not node & 1 else bytes((0, 128, 128))
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    ramp = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + identity + 4 * ramp + nodes + 3 * ramp
    return icc_profile(b"CMYK", b"Lab ", {b"wtpt": xyz_tag(np.ones(3)), b"A2B0": lut})


def srgb_encoded(linear: Array) -> Array:
    linear = np.clip(linear, 0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(255 * curve)


# Modes


def test_rgb_is_kept_and_copied() -> None:
    source = photo()
    result, notes = to_srgb(source)
    assert notes == []
    assert np.array_equal(pixels(result), pixels(source))
    result.putpixel((0, 0), (1, 2, 3))
    assert source.getpixel((0, 0)) != (1, 2, 3)


def test_result_is_not_converted_twice() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = reopened(photo(), "PNG", exif=exif, icc_profile=wide_gamut_profile())
    once, _ = to_srgb(source)
    twice, notes = to_srgb(once)
    assert notes == []
    assert np.array_equal(pixels(once), pixels(twice))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGBX", "RGBa", "RGBA", "La", "1"])
def test_opaque_modes_convert_without_notes(mode: str) -> None:
    grey = photo().convert("L").point(lambda value: 255 if value > 99 else 0)
    via = {"RGBa": "RGBA", "La": "LA"}.get(mode, "L")
    result, notes = to_srgb(grey.convert(via).convert(mode))
    assert result.mode == "RGB"
    assert notes == []
    assert np.array_equal(pixels(result), pixels(grey.convert("RGB")))


@pytest.mark.parametrize("mode", ["YCbCr", "HSV", "LAB"])
def test_other_colour_spaces(mode: str) -> None:
    result, notes = to_srgb(photo().convert(mode))
    assert len(notes) == 1
    assert notes[0].startswith(f"converted from {mode}")
    assert np.abs(pixels(result) - pixels(photo())).mean() < 3


def test_lab_without_a_profile() -> None:
    lab = photo().convert("LAB")
    lab.info = {}
    result, notes = to_srgb(lab)
    assert notes == ["converted from LAB without a colour profile"]
    assert np.abs(pixels(result) - pixels(photo())).mean() < 3


def test_cmyk_jpeg() -> None:
    source = reopened(photo().convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert source.mode == "CMYK"
    result, notes = to_srgb(source)
    assert notes == ["converted from CMYK without a colour profile"]
    assert np.abs(pixels(result) - pixels(photo())).mean() < 4


def test_animation_gives_the_frame_that_it_shows(tmp_path: Path) -> None:
    frames = [photo(), ImageOps.invert(photo())]
    source = reopened(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    for number, which in enumerate(("the first", "number 2")):
        source.seek(number)
        result, notes = to_srgb(source)
        assert source.tell() == number
        assert notes == [f"only {which} of several frames or pages is kept"]
        assert np.array_equal(pixels(result), pixels(frames[number]))
    file = tmp_path / "animation.webp"
    frames[0].save(file, save_all=True, append_images=frames[1:], lossless=True)
    result, notes = read_image(file)
    assert notes == ["only the first of several frames or pages is kept"]
    assert np.array_equal(pixels(result), pixels(frames[0]))


# More than 8 bits

RAMP_16 = np.linspace(0, 65535, 40 * 24).astype(np.uint16).reshape(24, 40)


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_file_is_scaled(format_: str) -> None:
    result, notes = to_srgb(reopened(Image.fromarray(RAMP_16), format_))
    assert notes == ["grey reduced to 8 bits: black is 0, white is 65535"]
    assert np.array_equal(pixels(result)[..., 1], np.rint(RAMP_16 / 257).astype(int))


@pytest.mark.parametrize(
    ("samples", "white"),
    [
        (RAMP_16.astype(np.int32), "65535"),
        (RAMP_16.astype(np.float32), "65535"),
        ((RAMP_16 / 65535).astype(np.float32), "1"),
        ((RAMP_16 / 257).astype(np.float32), "255"),
    ],
)
def test_wide_grey_is_scaled(samples: Array, white: str) -> None:
    result, notes = to_srgb(Image.fromarray(samples))
    assert notes == [f"grey reduced to 8 bits: black is 0, white is {white}"]
    assert np.abs(pixels(result)[..., 0] - RAMP_16 / 257).max() < 0.51


def test_samples_beyond_16_bits_are_stretched_not_clipped() -> None:
    samples = RAMP_16.astype(np.int32) * 4 - 1000
    result, notes = to_srgb(Image.fromarray(samples))
    assert notes == ["grey reduced to 8 bits: black is -1000, white is 261140"]
    assert np.abs(pixels(result)[..., 0] - RAMP_16 / 257).max() < 0.51


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_overshoot_of_floats_is_clipped(white: float) -> None:
    samples = (RAMP_16 / 65535 * white).astype(np.float32)
    plain, _ = to_srgb(Image.fromarray(samples))
    samples[0, :2] = -0.01 * white, 1.2 * white
    result, notes = to_srgb(Image.fromarray(samples))
    assert notes == [
        "samples beyond black and white are clipped",
        f"grey reduced to 8 bits: black is 0, white is {white:g}",
    ]
    assert list(pixels(result)[0, :2, 0]) == [0, 255]
    assert np.array_equal(pixels(result)[1:], pixels(plain)[1:])


def _tiff(samples: Array, *, bits: int, photometric: int, kind: int, packed: bytes) -> bytes:
    """An uncompressed grey TIFF of one strip."""
    rows, cols = samples.shape
    tags = {
        **{256: cols, 257: rows, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 12 * 10 + 4},
        **{277: 1, 278: rows, 279: len(packed), 339: kind},
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return head + packed


@pytest.mark.parametrize(
    ("kind", "photometric"),
    # Pillow refuses the other two.
    [("uint12", 1), ("uint16", 0), ("uint16", 1), ("uint32", 1), ("float32", 0), ("float32", 1)],
)
def test_grey_tiff_of_every_kind_is_a_ramp(kind: str, photometric: int, tmp_path: Path) -> None:
    white = {"uint12": 4095, "uint16": 65535, "uint32": 2**32 - 1, "float32": 1.0}[kind]
    ramp = np.linspace(0, 1, 40 * 24).reshape(24, 40)
    samples = ramp * white
    if kind == "uint12":
        pairs = np.rint(samples).astype(np.uint16).reshape(-1, 2)
        first, second = pairs[:, 0], pairs[:, 1]
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
        content = packed.astype(np.uint8).tobytes()
    else:
        content = samples.astype(f"<{np.dtype(kind).str[1:]}").tobytes()
    file = tmp_path / "ramp.tif"
    bits = int(kind[-2:])
    file.write_bytes(
        _tiff(
            ramp, bits=bits, photometric=photometric, kind=3 if "f" in kind else 1, packed=content
        )
    )
    result, _ = read_image(file)
    expected = 255 * (ramp if photometric else 1 - ramp)
    assert np.abs(pixels(result)[..., 0] - expected).max() < 0.51 + 255 / 4095


def _png(rows: bytes, *, depth: int, colours: int, clear: bytes) -> bytes:
    """A PNG of 32x32 pixels with a transparent colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", 32, 32, depth, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"tRNS", clear)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_transparent_grey_of_any_depth_is_found(depth: int, tmp_path: Path) -> None:
    """The left half is the transparent value, the right half black."""
    value = 1 if depth == 1 else 2
    half = np.repeat([value, 0], 16)
    bits = np.unpackbits(half[:, None].astype(np.uint8), axis=1)[:, 8 - depth :]
    row = b"\0" + np.packbits(bits).tobytes()
    file = tmp_path / "grey.png"
    file.write_bytes(_png(32 * row, depth=depth, colours=0, clear=struct.pack(">H", value)))
    result, _ = read_image(file)
    assert (pixels(result)[:, :16] == 255).all()
    assert (pixels(result)[:, 16:] == 0).all()


def test_a_transparent_colour_of_16_bits_is_told_and_ignored(tmp_path: Path) -> None:
    row = b"\0" + 32 * 3 * b"\x12\x34"
    file = tmp_path / "wide.png"
    file.write_bytes(_png(32 * row, depth=16, colours=2, clear=3 * b"\x12\x12"))
    result, notes = read_image(file)
    assert result.getextrema() == ((0x12, 0x12),) * 3
    assert notes == ["reduced to 8 bits", "a transparent colour of 16 bits is ignored"]


def test_constant_picture_out_of_range_does_not_divide_by_zero() -> None:
    result, _ = to_srgb(Image.new("I", (16, 16), -5))
    assert result.getextrema() == ((0, 0), (0, 0), (0, 0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(value: float) -> None:
    samples = np.zeros((16, 16), np.float32)
    samples[3, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_srgb(Image.fromarray(samples))


def test_16_bit_rgb_png_keeps_the_high_bytes() -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    rows = b"".join(b"\0" + row.astype(">u2").repeat(3).tobytes() for row in RAMP_16)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0))
    png += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    result, _ = to_srgb(Image.open(io.BytesIO(png)))
    assert np.abs(pixels(result)[..., 2] - RAMP_16 / 257).max() <= 1


# Alpha


def on_white(colour: Array, alpha: Array) -> Array:
    return np.asarray(255 - (255 - colour) * alpha[..., None] / 255)


def test_alpha_is_composited_on_white() -> None:
    source = photo()
    alpha = photo().getchannel("R")
    source.putalpha(alpha)
    result, notes = to_srgb(source)
    assert notes == ["alpha composited on white"]
    expected = on_white(pixels(photo()), pixels(alpha))
    assert np.abs(pixels(result) - expected).max() <= 1


def test_grey_with_alpha() -> None:
    source = Image.merge("LA", (photo().getchannel("G"), photo().getchannel("R")))
    result, notes = to_srgb(reopened(source, "PNG"))
    assert notes == ["alpha composited on white"]
    grey = pixels(photo().getchannel("G").convert("RGB"))
    assert np.abs(pixels(result) - on_white(grey, pixels(photo().getchannel("R")))).max() <= 1


def test_palette_with_one_transparent_colour() -> None:
    source = photo().quantize(8)
    result, notes = to_srgb(reopened(source, "PNG", transparency=3))
    clear = pixels(source) == 3
    assert notes == ["alpha composited on white"]
    assert (pixels(result)[clear] == 255).all()
    assert np.array_equal(pixels(result)[~clear], pixels(source.convert("RGB"))[~clear])


def test_palette_with_partial_transparency() -> None:
    source = photo().quantize(8)
    levels = bytes(range(0, 256, 36))
    result, _ = to_srgb(reopened(source, "PNG", transparency=levels))
    alpha = np.frombuffer(levels, np.uint8)[pixels(source)].astype(int)
    expected = on_white(pixels(source.convert("RGB")), alpha)
    assert np.abs(pixels(result) - expected).max() <= 1


@pytest.mark.parametrize(("mode", "key"), [("RGB", (10, 20, 30)), ("L", 77), ("1", 0), ("I;16", 9)])
def test_one_transparent_colour_in_png(mode: str, key: Any) -> None:
    source = Image.new(mode, (20, 20), key)
    result, notes = to_srgb(reopened(source, "PNG", transparency=key))
    assert notes[-1] == "alpha composited on white"
    assert result.getextrema() == ((255, 255),) * 3


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_exif_orientation(orientation: int, format_: str) -> None:
    upright = photo()
    transpose = Image.Transpose
    undo: dict[int, Callable[[Image.Image], Image.Image]] = {
        1: lambda image: image,
        2: lambda image: image.transpose(transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.transpose(transpose.ROTATE_180),
        4: lambda image: image.transpose(transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(transpose.TRANSPOSE),
        6: lambda image: image.transpose(transpose.ROTATE_90),
        7: lambda image: image.transpose(transpose.TRANSVERSE),
        8: lambda image: image.transpose(transpose.ROTATE_270),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    result, notes = to_srgb(reopened(undo[orientation](upright), format_, exif=exif))
    assert notes == []
    assert np.array_equal(pixels(result), pixels(upright))


@pytest.mark.parametrize("exif", [b"Exif\0\0II*", b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0"])
def test_broken_exif_is_ignored_with_a_note(exif: bytes) -> None:
    source = photo()
    source.info["exif"] = exif
    result, notes = to_srgb(source)
    assert notes == ["unreadable EXIF data ignored"]
    assert np.array_equal(pixels(result), pixels(photo()))


# Colour profiles


def test_srgb_profile_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    result, notes = to_srgb(reopened(photo(), "PNG", icc_profile=profile))
    assert notes == []
    assert np.abs(pixels(result) - pixels(photo())).max() <= 1


def test_wide_gamut_profile_is_converted() -> None:
    source = photo().point(lambda value: 80 + value // 4)  # inside the sRGB gamut
    result, notes = to_srgb(reopened(source, "PNG", icc_profile=wide_gamut_profile()))
    assert notes == ["converted to sRGB by its colour profile"]
    linear = (pixels(source) / 255) ** GAMMA
    matrix = np.linalg.inv(SRGB_TO_XYZ_D50) @ P3_TO_XYZ_D50
    expected = srgb_encoded(linear @ matrix.T)
    assert np.abs(expected - pixels(source)).max() > 10
    assert np.abs(pixels(result) - expected).max() <= 2


def test_profile_applies_before_compositing() -> None:
    plain, _ = to_srgb(reopened(photo(), "PNG", icc_profile=wide_gamut_profile()))
    half = photo().convert("RGBA")
    half.paste((0, 0, 0, 0), (20, 0, 40, 24))
    result, notes = to_srgb(reopened(half, "PNG", icc_profile=wide_gamut_profile()))
    assert notes == ["converted to sRGB by its colour profile", "alpha composited on white"]
    assert np.array_equal(pixels(result)[:, :20], pixels(plain)[:, :20])
    assert (pixels(result)[:, 20:] == 255).all()


def test_rgb_profile_on_grey() -> None:
    source = reopened(photo().convert("L"), "JPEG", icc_profile=wide_gamut_profile())
    result, notes = to_srgb(source)
    assert notes == ["converted to sRGB by its colour profile"]
    expected = srgb_encoded((pixels(source) / 255) ** GAMMA)
    assert np.abs(pixels(result)[..., 1] - expected).max() <= 2


def test_grey_profile() -> None:
    profile = icc_profile(
        b"GRAY", b"XYZ ", {b"wtpt": xyz_tag(np.array([0.9642, 1, 0.8249])), b"kTRC": gamma_tag(1)}
    )
    source = photo().convert("L")
    result, notes = to_srgb(reopened(source, "PNG", icc_profile=profile))
    assert notes == ["converted to sRGB by its colour profile"]
    assert np.abs(pixels(result)[..., 0] - srgb_encoded(pixels(source) / 255)).max() <= 2


def test_cmyk_profile() -> None:
    cyan = Image.new("CMYK", (32, 32), (255, 0, 0, 0))
    cyan.paste((0, 0, 0, 0), (16, 0, 32, 32))
    source = reopened(cyan, "JPEG", quality=95, icc_profile=ink_profile())
    result, notes = to_srgb(source)
    assert notes == ["converted from CMYK by its colour profile"]
    red, green, blue = pixels(result)[16, 4]
    assert red > 180
    assert max(green, blue) < 120
    assert pixels(result)[16, 28].min() > 250


@pytest.mark.parametrize(
    "profile",
    [b"", b"nonsense", wide_gamut_profile()[:200], ink_profile(), b"\xff" * 128],
)
def test_unusable_profile_is_ignored_with_a_note(profile: bytes) -> None:
    source = photo()
    source.info["icc_profile"] = profile
    result, notes = to_srgb(source)
    assert notes == ["unusable colour profile ignored"]
    assert np.array_equal(pixels(result), pixels(photo()))


# Files


@pytest.mark.parametrize("format_", ["png", "jpg", "webp", "bmp", "tiff", "ppm", "gif", "avif"])
def test_read_formats(tmp_path: Path, format_: str) -> None:
    path = tmp_path / f"photo.{format_}"
    photo().save(path)
    result, notes = read_image(path)
    assert (result.mode, result.size, notes) == ("RGB", (40, 24), [])
    assert np.abs(pixels(result) - pixels(photo())).mean() < 8


def test_suffix_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "photo.txt"
    path.write_bytes(encoded(photo(), "PNG"))
    assert np.array_equal(pixels(read_image(path)[0]), pixels(photo()))


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    text, empty, postscript = (tmp_path / name for name in ("a.png", "b.png", "c.eps"))
    text.write_text("hello")
    empty.touch()
    photo().save(postscript)
    for path, reason in [
        (text, "not a picture"),
        (empty, "the file is empty"),
        (postscript, "not a picture"),
        (tmp_path, "is a folder or a device"),
        (tmp_path / "missing.png", "cannot be opened: No such file"),
        (Path(os.devnull), "is a folder or a device"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            read_image(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def picture_or_reason(path: Path) -> Image.Image | str:
    try:
        return read_image(path)[0]
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "AVIF"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_truncated_files_are_refused_or_read(tmp_path: Path, format_: str) -> None:
    data = encoded(photo(), format_)
    path = tmp_path / "cut"
    refused = 0
    for length in range(1, len(data), max(1, len(data) // 60)):
        path.write_bytes(data[:length])
        outcome = picture_or_reason(path)
        if isinstance(outcome, str):
            refused += 1
            assert outcome.startswith(f"{path}: ")
            assert "\n" not in outcome
        else:
            assert outcome.size == (40, 24)
    assert refused > 40


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "AVIF", "BMP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_are_refused_or_read(tmp_path: Path, format_: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = encoded(photo(), format_, exif=exif, icc_profile=profile)
    generator = np.random.default_rng(0)
    path = tmp_path / "damaged"
    refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        for offset in generator.integers(0, min(len(data), 400), 4):
            damaged[offset] = generator.integers(0, 256)
        path.write_bytes(damaged)
        outcome = picture_or_reason(path)
        if isinstance(outcome, str):
            refused += 1
            assert outcome.startswith(f"{path}: ")
        else:
            assert outcome.mode == "RGB"
    assert refused > 0


@pytest.mark.parametrize(
    ("width", "height"),
    [(15, 64), (64, 15), (4097, 16), (16, 4097), (12000, 11000), (30000, 30000)],
)
def test_sizes_out_of_range_are_refused_before_decoding(
    tmp_path: Path, width: int, height: int
) -> None:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    check = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    path = tmp_path / "bomb.png"
    # No pixel data at all: decoding would fail with another message.
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + header + check + b"\0\0\0\0IDAT" + bytes(4))
    with pytest.raises(ValueError, match="each side must be 16 to 4096 pixels") as caught:
        read_image(path)
    assert f"{width}x{height}" in str(caught.value) or f"{width * height} pixels" in str(
        caught.value
    )


def test_check_size() -> None:
    check_size(16, 4096)
    with pytest.raises(ValueError, match="size 4097x16: each side"):
        check_size(4097, 16)


def test_write_png_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    metadata = {"Software": "percov2", "Caption": "chat \u2192 \u732b", "Note": "caf\u00e9"}
    write_png(path, photo(), metadata)
    data = path.read_bytes()
    with Image.open(path) as written:
        assert written.text == metadata  # type: ignore[attr-defined]
        assert written.info["srgb"] == 0
        assert ImageChops.difference(written, photo()).getbbox() is None
    assert data.count(b"iTXt") == 1
    assert data.count(b"tEXt") == 2


@pytest.mark.parametrize(
    ("mode", "metadata", "message"),
    [
        ("L", {}, "picture of mode L"),
        ("RGB", {"": "x"}, "metadata keyword ''"),
        ("RGB", {"k" * 80: "x"}, "metadata keyword 'kkk"),
        ("RGB", {"a\nb": "x"}, "metadata keyword"),
        ("RGB", {"key": "a\0b"}, "NUL"),
        ("RGB", {"key": "\ud800"}, "surrogates"),
    ],
)
def test_write_png_refuses(
    tmp_path: Path, mode: str, metadata: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_png(tmp_path / "out.png", photo().convert(mode), metadata)
    assert list(tmp_path.iterdir()) == []
