"""Pictures to tensors and back, and crops."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from percov2.data.transforms import CropTransform, image_to_tensor, tensor_to_image

Crop = Callable[[Image.Image], Tensor]


def crop(size: int, *, max_zoom: float = 1.0, train: bool) -> Crop:
    """Random crops of one source of randomness, or centre crops."""
    transform = CropTransform(size=size, max_zoom=max_zoom)
    rng = random.Random(0) if train else None
    return lambda image: transform(image, rng)


def ramp(width: int, height: int) -> Image.Image:
    """A picture that grows by 1 from column to column, at most 256 wide."""
    columns = np.arange(width, dtype=np.uint8)
    return Image.fromarray(np.tile(columns[None, :, None], (height, 1, 3)))


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_all_256_values_survive_the_round_trip() -> None:
    values = np.arange(256, dtype=np.uint8)
    pixels = np.stack([values, values[::-1], np.roll(values, 7)], axis=-1).reshape(16, 16, 3)
    tensor = image_to_tensor(Image.fromarray(pixels))
    assert (tensor.dtype, tensor.shape) == (torch.float32, (3, 16, 16))
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert torch.equal(tensor[0].flatten(), tensor[1].flatten().flip(0))
    np.testing.assert_array_equal(np.asarray(tensor_to_image(tensor)), pixels)


def test_tensors_out_of_range_are_clamped_and_rounded() -> None:
    tensor = torch.tensor([-7.0, -1.0, 0.0, 0.6 / 127.5, 9.0]).expand(3, 2, 5)
    picture = tensor_to_image(tensor.clone().requires_grad_())
    assert (picture.mode, picture.size) == ("RGB", (5, 2))
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 0, 128, 128, 255]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (200, 70), (70, 200), (33, 34), (500, 3), (1, 1)])
def test_any_picture_gives_a_square(shape: tuple[int, int], *, train: bool) -> None:
    tensor = crop(32, max_zoom=3.0, train=train)(noise(*shape))
    assert (tensor.dtype, tensor.shape) == (torch.float32, (3, 32, 32))
    assert tensor.min() >= -1
    assert tensor.max() <= 1


def test_validation_takes_the_largest_centre_crop() -> None:
    picture = noise(48, 20)
    expected = image_to_tensor(picture.crop((14, 0, 34, 20)))
    assert torch.equal(crop(20, train=False)(picture), expected)
    assert torch.equal(
        crop(20, train=False)(picture.transpose(Image.Transpose.TRANSPOSE)), expected.mT
    )


def test_a_crop_depends_on_its_source_of_randomness_alone() -> None:
    transform, picture = CropTransform(size=24, max_zoom=4.0), noise(100, 80)
    first, again, other = (transform(picture, random.Random(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = random.getstate()
    assert torch.equal(transform(picture, None), transform(picture, None))
    assert random.getstate() == state


def test_rounding_does_not_carry_a_crop_over_the_border() -> None:
    class Edge(random.Random):
        def random(self) -> float:
            return 1 - 2**-53

    transform = CropTransform(size=37, max_zoom=1.7)
    for width in range(41, 141, 7):
        assert transform(noise(width, 3 * width // 2), Edge()).shape == (3, 37, 37)


def slopes(
    transform: Callable[[Image.Image], Tensor], picture: Image.Image, draws: int = 40
) -> list[float]:
    """Grey levels per column: pixels of the original per pixel of the crop, signed by the flip."""
    levels = [transform(picture)[0].mean(0) * 127.5 for _ in range(draws)]
    return [((line[-4] - line[3]) / (len(line) - 7)).item() for line in levels]


def test_training_scales_vary_from_whole_picture_to_max_zoom() -> None:
    found = [abs(slope) for slope in slopes(crop(32, max_zoom=4.0, train=True), ramp(256, 256))]
    # The short side becomes 32 to 4 * 32 pixels.
    assert min(found) >= 256 / 128 - 0.1
    assert max(found) <= 256 / 32 + 0.1
    assert min(found) < 2.4
    assert max(found) > 5


def test_training_never_magnifies() -> None:
    found = [abs(slope) for slope in slopes(crop(64, max_zoom=4.0, train=True), ramp(100, 100))]
    assert min(found) >= 1 - 0.02
    assert max(found) <= 100 / 64 + 0.05


def test_only_pictures_that_are_too_small_are_magnified() -> None:
    found = [abs(slope) for slope in slopes(crop(64, max_zoom=4.0, train=True), ramp(32, 32), 4)]
    assert found == pytest.approx([0.5] * 4, abs=0.02)


def test_zoom_1_keeps_the_short_side() -> None:
    found = [abs(slope) for slope in slopes(crop(32, train=True), ramp(128, 64), 6)]
    assert found == pytest.approx([2.0] * 6, abs=0.05)


def test_training_flips_half_of_the_crops_and_moves_them() -> None:
    transform, picture = crop(32, train=True), ramp(200, 32)
    crops = [transform(picture)[0, 0] for _ in range(200)]
    flipped = sum(bool(line[0] > line[-1]) for line in crops)
    assert 70 < flipped < 130
    lefts = {round(min(line[0], line[-1]).item() * 127.5 + 127.5) for line in crops}
    assert all(0 <= left <= 200 - 32 for left in lefts)
    assert max(b - a for a, b in pairwise(sorted(lefts))) < 12
    assert min(lefts) < 8
    assert max(lefts) > 160


@pytest.mark.parametrize(("size", "max_zoom"), [(0, 1.0), (16, 0.5)])
def test_bad_settings_are_refused(size: int, max_zoom: float) -> None:
    with pytest.raises(ValueError, match=f"crop size {size} and max_zoom {max_zoom}"):
        crop(size, max_zoom=max_zoom, train=True)


def test_colour_jitter_changes_colours_and_neither_place_nor_validation() -> None:
    """The same draws before it: a configuration without it sees the crops that it always saw."""
    picture = noise(120, 90).resize((240, 180), Image.Resampling.BICUBIC)
    plain, jittered = (
        CropTransform(size=64, max_zoom=2.0, color_jitter=jitter) for jitter in (0.0, 0.3)
    )
    one, other = (transform(picture, random.Random(7)) for transform in (plain, jittered))
    assert torch.equal(one, CropTransform(size=64, max_zoom=2.0)(picture, random.Random(7)))
    assert not torch.equal(one, other)
    assert torch.equal(other, jittered(picture, random.Random(7)))
    correlation = torch.corrcoef(torch.stack([one.mean(0).flatten(), other.mean(0).flatten()]))
    assert correlation[0, 1] > 0.95
    assert torch.equal(plain(picture, None), jittered(picture, None))


def test_colour_jitter_keeps_its_factors_in_range() -> None:
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    transform, rng = CropTransform(size=32, max_zoom=1.0, color_jitter=0.3), random.Random(0)
    means = [float((transform(grey, rng).mean() + 1) * 127.5) for _ in range(50)]
    assert 69 <= min(means) < 80
    assert 120 < max(means) <= 131


@pytest.mark.parametrize("jitter", [-0.1, 1.0])
def test_refuses_a_colour_jitter_out_of_range(jitter: float) -> None:
    with pytest.raises(ValueError, match=f"color_jitter is {jitter}"):
        CropTransform(size=32, max_zoom=1.0, color_jitter=jitter)
