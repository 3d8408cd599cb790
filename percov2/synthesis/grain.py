"""Grain on painted pictures.

Shape legend: B batch, H and W rows and columns of pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from percov2.noise import seeded_noise
from percov2.synthesis.sharpening import local_mean

_FLOOR = 5 / 127.5
"""Added to the local contrast: surfaces of photographs are not without grain either."""

_SIDE = 15
"""Of the squares in which contrast is measured."""

_NEIGHBOUR = 0.25
"""Weight of the pixel before and after: a camera's grain is not finer than its demosaicing."""

_OTHER_STREAM = 0x9E3779B97F4A7C15
"""Grain of the same seed is other noise than what pictures are painted from."""


def add_grain(images: Tensor, amount: float, *, seed: int) -> Tensor:
    """Add noise as strong as a share of the local contrast, the same to all three colours.

    Video coding takes a film's grain out and gives it back so (AV1's film grain synthesis, Norkin
    and Birkbeck, DCC 2018). Here nothing of it is sent: it covers what repeats in painted
    surfaces, and what is even as no photograph is.

    Args:
        images: (B, 3, H, W) in about [-1, 1], clamped first.
        amount: standard deviation of the grain, as a share of that of luma nearby and a little
            more; 0 leaves pictures as they are.
        seed: of the noise, 0 to 2**64 - 1. It is drawn on the CPU, for the same on every device.

    Returns:
        (B, 3, H, W), not clamped again.
    """
    if amount == 0:
        return images
    images = images.clamp(-1, 1)
    luma = images.mean(1, keepdim=True)
    variance = local_mean(luma.square(), _SIDE) - local_mean(luma, _SIDE).square()
    strength = amount * (variance.clamp_min(0).sqrt() + _FLOOR)
    noise = seeded_noise(luma.shape, seed=seed ^ _OTHER_STREAM).to(images)
    return images + strength * _soften(noise)


def _soften(noise: Tensor) -> Tensor:
    """White noise (B, 1, H, W) to noise of as much variance that is softer than single pixels."""
    line = noise.new_tensor([_NEIGHBOUR, 1.0, _NEIGHBOUR])
    kernel = torch.outer(line, line) / line.square().sum()
    return F.conv2d(F.pad(noise, (1, 1, 1, 1), mode="circular"), kernel[None, None])
