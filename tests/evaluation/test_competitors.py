from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from percov2.evaluation.competitors import (
    FORMATS,
    SCALES,
    FormatCandidate,
    parse_rate,
)
from percov2.evaluation.pixel_metrics import MsSsim, Original, Psnr
from percov2.evaluation.weights import AbsentError
from tests.evaluation.pictures import make_picture, pixels_of

SIZE = (192, 176)


def _candidate(name: str) -> FormatCandidate:
    try:
        made = FORMATS[name]()
    except AbsentError as error:
        pytest.skip(str(error))
    return FormatCandidate(made, anchor="percov2 test", rate="same", family=name)


@pytest.mark.parametrize("name", list(FORMATS))
def test_largest_file_that_fits(name: str) -> None:
    candidate, image = _candidate(name), make_picture(1, SIZE)
    small = candidate.encode(image, "", 900)
    large = candidate.encode(image, "", 4000)
    assert not small.at_smallest
    assert not large.at_smallest
    assert 300 < len(small.data) <= 900 < len(large.data) <= 4000
    psnrs = []
    for encoded in (small, large):
        restored = candidate.decode(encoded.data, image.size)
        assert restored.size == image.size
        assert restored.mode == "RGB"
        original = Original(pixels=pixels_of(image), caption=None)
        psnrs.append(Psnr()(original, pixels_of(restored)))
        assert encoded.seconds is not None
        assert encoded.seconds >= 0
    assert psnrs[0] is not None
    assert psnrs[1] is not None
    assert 15 < psnrs[0] < psnrs[1]


@pytest.mark.parametrize("name", list(FORMATS))
def test_rate_that_cannot_be_reached_is_marked(name: str) -> None:
    candidate, image = _candidate(name), make_picture(1, SIZE)
    encoded = candidate.encode(image, "", 5)
    assert encoded.at_smallest
    assert len(encoded.data) > 5
    assert candidate.decode(encoded.data, image.size).size == image.size


def test_nothing_that_fits_is_better() -> None:
    candidate, image, target = _candidate("webp"), make_picture(2, SIZE), 600
    encoded = candidate.encode(image, "", target)
    original, ms_ssim = Original(pixels=pixels_of(image), caption=None), MsSsim()
    chosen = ms_ssim(original, pixels_of(candidate.decode(encoded.data, SIZE)))
    assert chosen is not None
    values = []
    for scale in SCALES:
        side = tuple(max(8, round(length * scale)) for length in SIZE)
        reduced = image if scale == 1 else image.resize(side, Image.Resampling.LANCZOS)
        for quality in range(0, 101, 30):
            file = io.BytesIO()
            reduced.save(file, "WEBP", quality=quality, method=6)
            if len(file.getvalue()) <= target:
                restored = candidate.decode(file.getvalue(), SIZE)
                value = ms_ssim(original, pixels_of(restored))
                assert value is not None
                values.append(value)
    assert len(values) > 3
    # Sizes are not strictly monotone in the quality, which halving takes for granted.
    assert chosen > max(values) - 0.005


def test_small_pictures_are_compared_by_psnr() -> None:
    candidate, image = _candidate("webp"), make_picture(0, (64, 48))
    encoded = candidate.encode(image, "", 400)
    assert len(encoded.data) <= 400
    assert np.asarray(candidate.decode(encoded.data, (64, 48))).shape == (48, 64, 3)


def test_rates() -> None:
    assert parse_rate("same") == 1
    assert parse_rate("2x") == 2
    assert parse_rate("0.5x") == 0.5
    for wrong in ("2", "x", "-1x", "0x", "nanx", "infx", "double"):
        with pytest.raises(ValueError, match=f"rate '{wrong}': say same"):
            parse_rate(wrong)


def test_names() -> None:
    made = FormatCandidate(FORMATS["jpeg"](), anchor="percov2 tiny-low", rate="2x", family="jpeg")
    assert made.info.slug == "jpeg-tiny-low-2x"
    assert made.info.label == "JPEG, 2x the bytes of percov2 tiny-low"
    assert made.rate == ("percov2 tiny-low", 2.0)
