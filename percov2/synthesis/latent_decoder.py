"""Token features to the latent grid: the light decoder that stage 1 trains.

Shape legend: B batch, M feature channels, r and c token rows and columns, f the reduction,
C latent channels, h = f r and w = f c latent rows and columns.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

from percov2.layers import ResidualBlock


class LatentDecoder(ModelMixin, ConfigMixin):
    """Predicts the latents from the quantised features: the mean that the tokens determine.

    In stage 1 it gives the hyper-encoder its gradient. In stage 2 its prediction conditions the
    flow, and may be the point that the flow starts from (`percov2.synthesis.flow.Flow`).

    Args:
        feature_channels: M of the quantiser.
        latent_channels: C of the autoencoder.
        hidden_channels: channels at token resolution; halved at every doubling, not below
            ``min_channels``.
        min_channels: channels at latent resolution, at least.
        blocks: residual blocks at each resolution.
        reduction: f, a power of two.

    Raises:
        ValueError: another reduction.
    """

    @register_to_config
    def __init__(
        self,
        *,
        feature_channels: int,
        latent_channels: int,
        hidden_channels: int,
        min_channels: int,
        blocks: int,
        reduction: int,
    ) -> None:
        super().__init__()
        if reduction < 1 or reduction & (reduction - 1):
            raise ValueError(f"reduction is {reduction}: it must be a power of two")
        channels = hidden_channels
        layers: list[nn.Module] = [nn.Conv2d(feature_channels, channels, 1)]
        layers.extend(ResidualBlock(channels) for _ in range(blocks))
        for _ in range(reduction.bit_length() - 1):
            narrower = max(channels // 2, min_channels)
            layers.append(nn.Conv2d(channels, 4 * narrower, 1))
            layers.append(nn.PixelShuffle(2))
            layers.extend(ResidualBlock(narrower) for _ in range(blocks))
            channels = narrower
        layers.append(nn.Conv2d(channels, latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    @property
    def condition_channels(self) -> int:
        """Channels that `condition` returns: M + C."""
        return int(self.config.feature_channels) + int(self.config.latent_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, M, r, c) to predicted latents (B, C, h, w)."""
        latents: Tensor = self.layers(features)
        return latents

    def condition(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, M, r, c) to the flow's condition (B, M + C, h, w) and prediction.

        The condition is the features, repeated to the latent grid (PerCo's way), and the
        predicted latents (B, C, h, w), which are also returned by themselves.
        """
        prediction = self(features)
        upsampled = F.interpolate(features, scale_factor=float(self.config.reduction))
        return torch.cat([upsampled, prediction], dim=1), prediction
