from __future__ import annotations

import pytest
import torch
from torch import Tensor

from percov2.synthesis.grain import add_grain


def contrasts() -> Tensor:
    """Even at the left, stripes of contrast 0.25 at the right: (1, 3, 128, 256)."""
    stripes = torch.tensor([-0.25, 0.25]).repeat(64).expand(128, 128)
    picture = torch.cat([torch.zeros(128, 128), stripes], 1)
    return picture.expand(1, 3, 128, 256)


def test_grain_is_a_share_of_the_contrast_nearby() -> None:
    grain = add_grain(contrasts(), 0.2, seed=1) - contrasts()
    even, striped = grain[0, 0, :, :112], grain[0, 0, :, 144:]
    assert float(even.std()) == pytest.approx(0.2 * 5 / 127.5, rel=0.03)
    assert float(striped.std()) == pytest.approx(0.2 * (0.25 + 5 / 127.5), rel=0.03)
    assert abs(float(striped.mean())) < 0.1 * float(striped.std())
    for color in grain[0, 1:]:
        torch.testing.assert_close(color, grain[0, 0], atol=1e-6, rtol=0)


def test_grain_is_softer_than_single_pixels_and_not_oriented() -> None:
    grain = add_grain(torch.zeros(1, 3, 256, 256), 1.0, seed=1)[0, 0]
    unit = grain / grain.std()
    # Of the kernel (1/4, 1, 1/4): 2 * 1/4 against 1 + 2 / 16, one and two pixels apart.
    for one, two in ((unit, unit.roll(1, 0)), (unit, unit.roll(1, 1))):
        assert float((one * two).mean()) == pytest.approx(0.5 / 1.125, abs=0.03)
    assert float((unit * unit.roll(2, 0)).mean()) == pytest.approx(0.0625 / 1.125, abs=0.03)


def test_grain_is_that_of_the_seed_and_none_is_none() -> None:
    picture = contrasts()
    assert torch.equal(add_grain(picture, 0.2, seed=7), add_grain(picture, 0.2, seed=7))
    assert not torch.equal(add_grain(picture, 0.2, seed=7), add_grain(picture, 0.2, seed=8))
    assert torch.equal(add_grain(picture, 0.0, seed=7), picture)
    assert add_grain(picture, 0.2, seed=2**64 - 1).isfinite().all()


def test_grain_is_not_the_noise_that_is_painted_from() -> None:
    start = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    grain = add_grain(torch.zeros(1, 3, 64, 64), 1.0, seed=3)[:, :1]
    assert abs(float((start * grain).mean() / grain.std())) < 0.1


def test_small_pictures_have_grain_too() -> None:
    assert add_grain(torch.zeros(2, 3, 1, 16), 0.2, seed=0).std() > 0
