"""Generated pictures that compress like photographs: smooth shapes, an edge and some texture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from percov2.data.transforms import image_to_tensor


def make_picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A picture of its own colours for every seed."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(rng.uniform(0.02, 0.2) * x + rng.uniform(0.02, 0.2) * y) for _ in range(3)]
    pixels: NDArray[np.float64] = 128 + 60 * np.stack(waves, 2)
    pixels[:, : width // 3] += rng.uniform(-60, 60, 3)
    pixels += rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_folder(folder: Path, count: int, size: tuple[int, int] = (64, 48)) -> Path:
    """``a.png``, ``b.png``, ..."""
    folder.mkdir(parents=True)
    for number in range(count):
        make_picture(number, size).save(folder / f"{chr(ord('a') + number)}.png")
    return folder


def pixels_of(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in [0, 1]."""
    return ((image_to_tensor(image)[None] + 1) / 2).clamp(0, 1)


class TinyFeatures(nn.Module):
    """uint8 (N, 3, H, W) to (N, 6): means and spreads of colours."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        """Features."""
        pixels = images.float() / 255
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], dim=1)
