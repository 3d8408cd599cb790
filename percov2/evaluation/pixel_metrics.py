"""Metrics of a picture and its original that need no network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
)

MS_SSIM_SIDE = 176
"""Rows and columns of pixels that the five scales of MS-SSIM need at least."""


@dataclass(kw_only=True, slots=True)
class Original:
    """An original picture and what is derived from it, once for all codecs.

    Attributes:
        pixels: float32 (1, 3, H, W) in [0, 1].
        caption: of the picture, None if there is none.
        derived: by metric.
    """

    pixels: Tensor
    caption: str | None
    derived: dict[str, Any] = field(default_factory=dict)


class PairMetric(Protocol):
    """A number for each picture.

    Attributes:
        name: see `percov2.evaluation.metrics`.
        identity: names the network and its weights; values of two identities do not compare.
        network: whether a network is run, which is timed apart.
        needs: what a picture must have to get a value, for people.
    """

    name: str
    identity: str
    network: bool
    needs: str

    def __call__(self, original: Original, restored: Tensor) -> float | None:
        """A value, or None for a picture that can have none.

        Args:
            original: see `Original`.
            restored: float32 (1, 3, H, W) in [0, 1].
        """
        ...


class Psnr:
    """Peak signal-to-noise ratio over all pixels and channels, dB; none for equal pictures."""

    name, identity, network, needs = "psnr", "psnr", False, "a difference from the original"

    def __call__(self, original: Original, restored: Tensor) -> float | None:
        """See `PairMetric`."""
        value = float(peak_signal_noise_ratio(restored, original.pixels, data_range=1.0))
        return value if value < float("inf") else None


class MsSsim:
    """Multi-scale structural similarity (Wang et al. 2003) of RGB, five scales."""

    name, identity, network = "ms_ssim", "ms_ssim", False
    needs = f"at least {MS_SSIM_SIDE} pixels a side"

    def __call__(self, original: Original, restored: Tensor) -> float | None:
        """See `PairMetric`."""
        if min(restored.shape[2:]) < MS_SSIM_SIDE:
            return None
        # Twice as fast on a CPU in this layout.
        layout = torch.channels_last
        preds = restored.contiguous(memory_format=layout)
        target = original.pixels.contiguous(memory_format=layout)
        return float(multiscale_structural_similarity_index_measure(preds, target, data_range=1.0))


def gradient_energy(image: Tensor) -> float:
    """Mean squared difference of pixels next to each other, down and across, of all channels.

    Relative to the original's it tells blur (below 1) from noise (above 1). It says nothing of
    whether the detail is right.
    """
    down = image[..., 1:, :] - image[..., :-1, :]
    across = image[..., 1:] - image[..., :-1]
    return float(down.square().mean() + across.square().mean())


def gradient_magnitude(image: Tensor) -> float:
    """Mean length of the gradient: of the differences down and across, of all channels.

    `gradient_energy` is mostly that of a picture's few strong edges; here fine texture, which
    covers most of it, weighs more.
    """
    down = image[..., 1:, :-1] - image[..., :-1, :-1]
    across = image[..., :-1, 1:] - image[..., :-1, :-1]
    return float(torch.hypot(down, across).mean())


class GradientEnergy:
    """See `gradient_energy`; relative to the original's, none for an original without gradient."""

    name, identity, network = "gradient_energy", "gradient_energy", False
    needs = "an original that is not of one colour"
    measure = staticmethod(gradient_energy)

    def __call__(self, original: Original, restored: Tensor) -> float | None:
        """See `PairMetric`."""
        reference = self.measure(original.pixels)
        return self.measure(restored) / reference if reference else None


class GradientMagnitude(GradientEnergy):
    """See `gradient_magnitude`; relative as `GradientEnergy` is."""

    name, identity = "gradient_magnitude", "gradient_magnitude"
    measure = staticmethod(gradient_magnitude)
