"""A picture that a metric of realism must not fall for."""

from __future__ import annotations

from PIL import Image, ImageFilter
from torch import Tensor

from percov2.data.transforms import image_to_tensor, tensor_to_image
from percov2.evaluation.pixel_metrics import gradient_energy
from percov2.noise import seeded_noise


def blurred_with_grain(
    original: Image.Image, restored: Image.Image, *, sigma: float = 2.0, seed: int = 0
) -> Image.Image:
    """Blur a reconstruction and add grey noise until its gradient energy is the original's.

    Such a picture has as much detail as the original by that simple measure, and none of it is
    right. A Fréchet distance that ranks it above the reconstruction itself measures nothing.

    Args:
        original: has the gradient energy that is aimed at.
        restored: is blurred; of the same size.
        sigma: of the Gaussian blur in pixels.
        seed: of the noise.
    """
    target = gradient_energy(image_to_tensor(original)[None])
    smooth = image_to_tensor(restored.filter(ImageFilter.GaussianBlur(sigma)))[None]
    grain = seeded_noise((1, 1, *smooth.shape[2:]), seed=seed)
    low, high = 0.0, 2.0
    for _ in range(20):  # clipping makes the energy no simple function of the amount
        middle = (low + high) / 2
        if gradient_energy(_clip(smooth + middle * grain)) < target:
            low = middle
        else:
            high = middle
    return tensor_to_image((smooth + low * grain)[0])


def _clip(pixels: Tensor) -> Tensor:
    return pixels.clamp(-1, 1)
