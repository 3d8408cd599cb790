"""Adversarial finetuning of the flow for one or a few sampling steps.

A flow that is trained by squared error alone needs many steps, and much capacity, before its
pictures are as sharp as photographs. Judged in the features of an ImageNet network, against a
discriminator that learns there too, it can paint in one step: "Projected GANs converge faster"
(Sauer et al., NeurIPS 2021), applied to a student of the sampling grid as in "Adversarial
diffusion distillation" (Sauer et al., ECCV 2024), without a teacher: the tokens say enough of the
picture for the original to serve as the target.

Shape legend: B batch, H and W rows and columns of pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from percov2.efficientnet import EfficientNetLite
from percov2.training.optimization import Optimization

LEVEL_CHANNELS = (32, 24, 40, 112, 320)
"""Channels of EfficientNet-Lite0's maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution."""


class AdversarialLosses(NamedTuple):
    """Losses of a step, each a scalar.

    Attributes:
        pixels: mean squared difference of the pixels, to be lowered by the painter.
        features: mean absolute difference of standardised features, to be lowered by the painter.
        realism: minus the discriminator's opinion of the painted pictures, to be lowered by the
            painter; has no gradient to the discriminator.
        discriminator: hinge loss, to be lowered by the discriminator; has no gradient to the
            painter.
    """

    pixels: Tensor
    features: Tensor
    realism: Tensor
    discriminator: Tensor


class Adversary(nn.Module):
    """Discriminator heads on frozen EfficientNet-Lite0 features, and how their losses are weighed.

    Args:
        steps: sampling steps that the flow learns to paint in; training times are their grid's.
        flow_weight: of the flow's own squared error of the latents.
        pixel_weight: of the squared error of the pixels, in [-1, 1].
        feature_weight: of `AdversarialLosses.features`.
        realism_weight: of `AdversarialLosses.realism`.
        optimization: of the discriminator.
        train_decoder: whether the autoencoder's decoder learns too. A light autoencoder blurs
            even the originals; no latents that a flow could paint would then look sharp.
        channels: of a head, at most.

    Raises:
        ValueError: EfficientNet-Lite0's packages are not installed; steps < 1, or a negative
            weight.
    """

    def __init__(
        self,
        *,
        steps: int,
        flow_weight: float,
        pixel_weight: float,
        feature_weight: float,
        realism_weight: float,
        optimization: Optimization,
        train_decoder: bool,
        channels: int = 64,
    ) -> None:
        super().__init__()
        weights = (flow_weight, pixel_weight, feature_weight, realism_weight)
        if steps < 1 or min(weights) < 0:
            raise ValueError(
                f"steps is {steps} and must be at least 1; flow, pixel, feature and realism "
                f"weights are {weights} and must not be negative"
            )
        self.steps, self.optimization, self.train_decoder = steps, optimization, train_decoder
        self.flow_weight, self.pixel_weight = flow_weight, pixel_weight
        self.feature_weight, self.realism_weight = feature_weight, realism_weight
        self.heads = nn.ModuleList(_head(n, min(n, channels)) for n in LEVEL_CHANNELS)
        try:
            # In a list: frozen weights belong neither to checkpoints nor to what a strategy shards.
            self._network = [EfficientNetLite(0).to(memory_format=torch.channels_last)]
        except ModuleNotFoundError as error:
            raise ValueError(f"an adversary needs EfficientNet-Lite0: {error}") from error

    def forward(self, painted: Tensor, original: Tensor) -> AdversarialLosses:
        """Pictures (B, 3, H, W) in [-1, 1] to the losses; gradients as `AdversarialLosses` says."""
        with torch.no_grad():
            real = self._features(original)
        fake = self._features(painted)
        # In units of the batch's originals: no level, and no channel, drowns the others.
        moments = [torch.std_mean(level, dim=(0, 2, 3), keepdim=True) for level in real]
        real, fake = (
            [
                (level - mean) / (std + 1e-3)
                for level, (std, mean) in zip(levels, moments, strict=True)
            ]
            for levels in (real, fake)
        )
        pairs = list(zip(fake, real, strict=True))
        self.heads.requires_grad_(False)
        realism = -torch.stack([opinion.mean() for opinion in self._opinions(fake)]).mean()
        self.heads.requires_grad_(True)
        detached = [level.detach() for level in fake]
        return AdversarialLosses(
            pixels=F.mse_loss(painted, original),
            features=torch.stack([F.l1_loss(one, other) for one, other in pairs]).mean(),
            realism=realism,
            discriminator=self._hinge(real, 1) + self._hinge(detached, -1),
        )

    def total(self, flow: Tensor, losses: AdversarialLosses) -> Tensor:
        """What is minimised: the painter's weighted terms, and the discriminator's own loss.

        Args:
            flow: squared error of the flow, a scalar.
            losses: of the same step.
        """
        return (
            self.flow_weight * flow
            + self.pixel_weight * losses.pixels
            + self.feature_weight * losses.features
            + self.realism_weight * losses.realism
            + losses.discriminator
        )

    def _features(self, pictures: Tensor) -> list[Tensor]:
        network = self._network[0].to(pictures.device)
        pictures = (pictures.float() + 1) * 127.5
        return network.pyramid(pictures.contiguous(memory_format=torch.channels_last))

    def _opinions(self, levels: list[Tensor]) -> list[Tensor]:
        return [head(level) for head, level in zip(self.heads, levels, strict=True)]

    def _hinge(self, levels: list[Tensor], sign: int) -> Tensor:
        """Hinge loss (Lim and Ye, 2017) of pictures that should be called sign * 1."""
        return torch.stack([F.relu(1 - sign * x).mean() for x in self._opinions(levels)]).mean()


def _head(channels_in: int, channels: int) -> nn.Sequential:
    """Features of one resolution to an opinion at every place: real (1) or painted (-1)."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels_in, channels, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(channels, 1, 1)),
    )
