"""What of painted pictures is compared with the originals, and what is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from percov2.training.picture_distances import (
    detail_distance,
    luma_and_chroma,
    pattern_distance,
    wasserstein_distortion,
)


def pictures(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, 64, 64, generator=generator) * 2 - 1


def test_distortion_forgives_texture_for_its_place_and_not_for_its_strength() -> None:
    """Noise against other noise of the same strength, against weaker noise, and against none."""
    texture = pictures(1)
    apart = [
        float(wasserstein_distortion([texture], [other]))
        for other in (pictures(2), 0.5 * pictures(2), torch.zeros_like(texture))
    ]
    assert apart[0] < 0.1 * apart[1] < 0.1 * apart[2]
    assert apart[0] < 0.1 * float(torch.nn.functional.mse_loss(texture, pictures(2)))


def test_distortion_is_that_of_its_definition() -> None:
    """One window, computed with numpy's moments."""
    one, other = (pictures(seed)[:1, :1, :16, :16] for seed in (1, 2))
    means = float(one.mean() - other.mean())
    roots = [float((x.numpy().var() + 1e-2) ** 0.5) for x in (one, other)]
    expected = means**2 + (roots[0] - roots[1]) ** 2
    assert float(wasserstein_distortion([one], [other])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("level", "cells"), [(0, 16), (1, 8), (2, 4), (3, 4), (4, 4), (5, 2), (6, 1)]
)
def test_windows_have_four_cells_at_least_where_the_map_has_them(level: int, cells: int) -> None:
    """What changes one cell in the corner is told by the corner's window alone."""
    levels = [torch.zeros(1, 1, 64 >> n, 64 >> n) for n in range(7)]
    changed = [*levels]
    changed[level] = levels[level].clone()
    changed[level][..., 0, 0] = 3.0
    mean = 3 / cells**2
    deviation = (9 / cells**2 - mean**2 + 1e-2) ** 0.5 - 0.1
    windows = max((64 >> level) // max(cells // 2, 1) - 1, 1) ** 2
    expected = (mean**2 + deviation**2) / windows / len(levels)
    assert float(wasserstein_distortion(changed, levels)) == pytest.approx(expected, rel=1e-4)


def test_detail_is_compared_by_strength_octave_by_octave() -> None:
    """Other noise of the same strength, half of it, twice of it; waves of each octave."""
    # Of two pictures alone there are twelve windows a class, whose mean spectra differ by chance.
    texture, other = (torch.cat([pictures(n) for n in range(k, 12, 2)]) for k in (0, 1))
    apart = [float(detail_distance(x, texture)) for x in (other, 0.5 * texture, 2 * texture)]
    assert apart[0] < 0.02
    assert apart[1:] == pytest.approx([math.log(2) ** 2] * 2, rel=0.05)
    for period in (3, 6, 12):
        wave = torch.sin(2 * torch.pi * torch.arange(64.0) / period).expand(1, 3, 64, 64)
        assert float(detail_distance(0.25 * wave, 0.5 * wave)) > 0.07, period


def test_the_best_guess_of_unknown_detail_is_not_too_weak_on_the_whole() -> None:
    """Detail of strength 0.8 at the left and 0.05 at the right, guessed as the same everywhere:
    between the geometric mean, 0.2, which windows ask for, and the root mean square, 0.57."""
    where = torch.where(torch.arange(64) < 32, 0.8, 0.05)
    original, texture = where * pictures(1), pictures(2)
    weak, between, strong = (
        float(detail_distance(guess * texture, original)) for guess in (0.2, 0.34, 0.57)
    )
    assert between < weak - 0.05
    assert between < strong - 0.05


def test_a_ripple_is_told_from_texture_with_its_energy() -> None:
    """Waves of 4.8 pixels a period instead of all of noise between 4 and 8, beside other noise;
    the same where the right half has ten times the detail, as foliage has beside a sky."""
    generator = torch.Generator().manual_seed(0)
    texture, other = 0.05 * torch.randn(2, 4, 3, 96, 96, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(96)[:, None], torch.fft.rfftfreq(96))
    band = (frequency >= 1 / 8) & (frequency < 1 / 4)
    octave = torch.fft.irfft2(torch.fft.rfft2(texture) * band)
    wave = torch.sin(2 * torch.pi * torch.arange(96.0) / 4.8)
    ripple = wave + wave[:, None]
    ripple = ripple * octave.std() / ripple.std()
    strength = torch.where(torch.arange(96) < 48, 1.0, 10.0)
    for where, least in ((torch.ones(96), 4), (strength, 2)):
        original = where * texture
        alone = float(detail_distance(where * other, original))
        flat = torch.where(where == 1, texture - octave + ripple, where * other)
        assert float(detail_distance(flat, original)) > least * alone


def test_luma_and_chroma_are_those_of_jfif() -> None:
    """Pillow's, whose chroma is centred on 128, within its rounding."""
    picture = torch.randint(256, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(picture[0].permute(1, 2, 0).numpy().astype(np.uint8))
    expected = torch.from_numpy(np.asarray(image.convert("YCbCr")).copy()).permute(2, 0, 1)
    found = luma_and_chroma(picture.float())[0] + torch.tensor([0.0, 128.0, 128.0])[:, None, None]
    assert float((found - expected).abs().max()) <= 1


def test_detail_of_luma_is_told_from_coloured_grain() -> None:
    """Of the same strength in red, green and blue."""
    generator = torch.Generator().manual_seed(0)
    grey = 0.1 * torch.randn(1, 1, 64, 64, generator=generator).expand(1, 3, 64, 64)
    coloured = 0.1 * torch.randn(1, 3, 64, 64, generator=generator)
    assert float(detail_distance(coloured, grey)) > 0.5


def test_detail_too_weak_to_be_seen_does_not_count() -> None:
    assert float(detail_distance(torch.zeros(2, 3, 64, 64), 0.002 * pictures(1))) < 1e-3


@pytest.mark.parametrize("period", [2, 4, 8, 16])
def test_what_repeats_is_told_from_texture(period: int) -> None:
    """On a picture with a shade from left to right, which is no pattern; not of whole patches."""
    shade = torch.linspace(-0.5, 0.5, 160).expand(2, 3, 160, 160)
    generator = torch.Generator().manual_seed(period)
    noise = 0.2 * torch.randn(2, 3, 160, 160, generator=generator)
    tile = noise[..., :period, :period].tile(160 // period, 160 // period)
    original = shade + noise
    alone, repeated, flat = (
        float(pattern_distance(painted[..., :152, :152], original[..., :152, :152]))
        for painted in (shade + 0.2 * torch.randn_like(noise), shade + tile, shade)
    )
    assert flat < 0.1
    assert alone < 0.1
    assert repeated > 0.5
