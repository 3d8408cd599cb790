"""Detail across the borders of patches, for the light autoencoder's decoder.

Shape legend: B batch, C latent channels, h = H / 8 and w = W / 8 latent rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.layers import ResidualBlock, zeroed
from percov2.noise import seeded_noise

NOISE_CHANNELS = 4
"""Channels of noise at either resolution: at half, as many numbers as the picture has pixels."""


class Refiner(nn.Module):
    """Convolutions at a quarter and at half the resolution that add detail to a decoded picture.

    A decoder that works at an eighth of the resolution alone puts every 8x8 patch out by itself,
    and where the latents are flat nothing but the place in the patch distinguishes its pixels:
    asked for texture, it finds one little pattern and repeats it. Here neighbours overlap, and
    texture can be made of noise. The noise depends on the shape only, so that decoding is
    repeatable. The last layer starts at zero: an untrained refiner leaves the picture as it is.

    Args:
        latent_channels: C.
        width: channels at half the resolution; a quarter has twice as many.
        blocks: residual blocks at a quarter, even; half the resolution has half as many.

    Raises:
        ValueError: a width below 1, or a number of blocks that is odd or below 2.
    """

    def __init__(self, latent_channels: int, width: int, blocks: int) -> None:
        super().__init__()
        if width < 1 or blocks < 2 or blocks % 2:
            raise ValueError(
                f"refiner_width is {width} and refiner_blocks {blocks}: the width must be at least "
                "1, the blocks even and at least 2; both are 0 for no refiner"
            )
        self.enter = nn.Conv2d(3 * 4**2 + latent_channels + NOISE_CHANNELS, 2 * width, 1)
        self.at_quarter = nn.Sequential(
            *(ResidualBlock(2 * width) for _ in range(blocks)),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
        )
        self.at_half = nn.Sequential(
            nn.Conv2d(3 * 2**2 + width + NOISE_CHANNELS, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(blocks // 2)),
            nn.SiLU(),
            zeroed(nn.Conv2d(width, 3 * 2**2, 3, padding=1)),
            nn.PixelShuffle(2),
        )

    def forward(self, latents: Tensor, picture: Tensor) -> Tensor:
        """Latents (B, C, h, w) and the picture (B, 3, 8 h, 8 w) decoded of them to a finer one."""
        found = F.interpolate(latents, scale_factor=2.0, mode="nearest")
        found = self.enter(torch.cat([F.pixel_unshuffle(picture, 4), found, _noise(found)], 1))
        found = self.at_quarter(found)
        found = torch.cat([F.pixel_unshuffle(picture, 2), found, _noise(found)], 1)
        refined: Tensor = picture + self.at_half(found)
        return refined


def _noise(like: Tensor) -> Tensor:
    """Standard normal (B, NOISE_CHANNELS, rows and columns as of ``like``), always the same."""
    return seeded_noise((like.shape[0], NOISE_CHANNELS, *like.shape[2:]), seed=0).to(like)
