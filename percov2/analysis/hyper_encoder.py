"""PerCo's hyper-encoder: latents to the feature grid that is vector-quantised.

Source: Careil et al., "Towards image compression with perfect realism at ultra-low bitrates"
(ICLR 2024), appendix. Shape legend: B batch, C latent channels, h and w latent rows and columns,
f the reduction (1, 2, 4 or 8), M output channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from compressai.layers import AttentionBlock
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

REDUCTIONS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class RateConfig:
    """A rate of the paper, named by the token grid of a 512x512 image and the codebook size.

    Attributes:
        reduction: latents per token along rows and along columns.
        codebook_size: number of codes V; a power of two.
        bits_per_pixel: nominal rate of the tokens, log2(V) bits each, without entropy model.
    """

    reduction: int
    codebook_size: int
    bits_per_pixel: float


def _rate(side: int, codebook_size: int) -> RateConfig:
    bits = side * side * (codebook_size.bit_length() - 1)
    return RateConfig(
        reduction=64 // side, codebook_size=codebook_size, bits_per_pixel=bits / 512**2
    )


RATES = {
    f"{side}x{codebook}": _rate(side, codebook)
    for side, codebook in (
        (8, 256),
        (8, 1024),
        (16, 1024),
        (32, 256),
        (32, 8192),
        (64, 64),
        (64, 256),
    )
}
"""The seven rates, by grid side at 512x512 and codebook size."""


class BottleneckBlock(nn.Module):
    """Residual bottleneck: 1x1 to half the channels, 3x3, 1x1 back, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.body = nn.Sequential(
            nn.Conv2d(channels, half, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same shape."""
        out: Tensor = x + self.body(x)
        return out


class HyperEncoder(ModelMixin, ConfigMixin):
    """Three groups of a convolution and three bottleneck blocks, with two attention blocks.

    The convolution before a group is 1x1, or 5x5 with stride 2 in the last log2(f) groups.
    CompressAI's ``AttentionBlock`` follows the second group and the final 1x1 convolution.

    Args:
        latent_channels: C of the autoencoder.
        hidden_channels: N of the paper (192).
        out_channels: M of the paper (320).
        reduction: f, latents per token along an axis; one of 1, 2, 4, 8.

    Raises:
        ValueError: another reduction.
    """

    @register_to_config
    def __init__(
        self, *, latent_channels: int, hidden_channels: int, out_channels: int, reduction: int
    ) -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction is {reduction}: choose one of {REDUCTIONS}")
        strided = REDUCTIONS.index(reduction)
        layers: list[nn.Module] = []
        channels = latent_channels
        for group in range(3):
            if group >= 3 - strided:
                layers.append(nn.Conv2d(channels, hidden_channels, 5, stride=2, padding=2))
            else:
                layers.append(nn.Conv2d(channels, hidden_channels, 1))
            layers.extend(BottleneckBlock(hidden_channels) for _ in range(3))
            if group == 1:
                layers.append(AttentionBlock(hidden_channels))
            channels = hidden_channels
        layers.append(nn.Conv2d(hidden_channels, out_channels, 1))
        layers.append(AttentionBlock(out_channels))
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to features (B, M, h / f, w / f).

        Raises:
            ValueError: h or w not a multiple of the reduction.
        """
        f = self.config.reduction
        if latents.shape[2] % f or latents.shape[3] % f:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}: rows and columns must be multiples "
                f"of the reduction {f}; pad the image to multiples of {8 * f} pixels"
            )
        features: Tensor = self.layers(latents)
        return features
