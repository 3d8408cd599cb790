"""Image to training sample. Shape legend: H and W are the crop's side in pixels."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as tv


def image_to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to float32 (3, H, W) in [-1, 1]."""
    array = np.asarray(image, np.float32)
    return torch.from_numpy(array).movedim(-1, 0) / 127.5 - 1


def tensor_to_image(tensor: Tensor) -> Image.Image:
    """Float (3, H, W), about [-1, 1], clamped, to an RGB picture."""
    pixels = ((tensor.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.movedim(0, -1).cpu().numpy())


@dataclass(frozen=True, kw_only=True, slots=True)
class CropTransform:
    """Resize with the aspect ratio kept, crop a square, flip, and change the colours.

    Attributes:
        size: side of the crop in pixels.
        max_zoom: random crops: the short side is resized to a random length between ``size`` and
            ``max_zoom * size``, but not above its own length; at least 1.
        color_jitter: random crops: brightness, contrast and saturation are each multiplied by a
            random factor between ``1 - color_jitter`` and ``1 + color_jitter``; 0 to below 1.

    Raises:
        ValueError: size or zoom below 1, or a jitter out of range.
    """

    size: int
    max_zoom: float
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1 or self.max_zoom < 1:
            raise ValueError(
                f"crop size {self.size} and max_zoom {self.max_zoom} must be at least 1"
            )
        if not 0 <= self.color_jitter < 1:
            raise ValueError(
                f"color_jitter is {self.color_jitter}: choose at least 0, off, and less than 1"
            )

    def __call__(self, image: Image.Image, rng: random.Random | None) -> Tensor:
        """RGB picture of any size to float32 (3, size, size) in [-1, 1].

        Args:
            image: the picture.
            rng: source of scale, place, flip and colours; None takes the largest centre crop, as
                it is.
        """
        target, place, flip = float(self.size), (0.5, 0.5), False
        if rng is not None:
            longest = max(target, min(float(min(image.size)), self.max_zoom * self.size))
            target = rng.uniform(self.size, longest)
            place = (rng.random(), rng.random())
            flip = rng.random() < 0.5
        # Side of the crop in pixels of the original: only what is kept is resampled.
        side = self.size * min(image.size) / target
        left, top = ((length - side) * p for length, p in zip(image.size, place, strict=True))
        # Rounding must not carry the box over the border, which Pillow refuses.
        right, bottom = min(left + side, image.width), min(top + side, image.height)
        box = (left, top, right, bottom)
        crop = image.resize((self.size, self.size), Image.Resampling.LANCZOS, box=box)
        if flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng is not None and self.color_jitter:
            for adjust in (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation):
                crop = adjust(crop, rng.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        return image_to_tensor(crop)
