"""A discriminator of pixels, which knows what the painter was told.

Shape legend: B batch, H and W rows and columns of pixels, C latent channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from percov2.model_store import PATCH
from percov2.training.picture_distances import luma_and_chroma

CHROMA = 4.0
"""How many times as strong chroma is shown: a photograph's has little contrast, and less detail."""


class PatchDiscriminator(nn.Module):
    """Whether the detail at a place is a photograph's, given the prediction of its latents.

    The features of an ImageNet network are nearly blind to fine grain, and a discriminator on them
    never hears what a place should show: grain on a plain wall passes for the texture of bark. This
    one sees all pixels of 56x56 at most (a "PatchGAN", Isola et al., CVPR 2017), and the stage 1
    prediction that the painter began from, as that of "High-fidelity generative image compression"
    (Mentzer et al., NeurIPS 2020) sees the latents.

    Args:
        latent_channels: C.
        width: channels at half the resolution; twice as many at a quarter, four times at an eighth.
    """

    def __init__(self, latent_channels: int, width: int) -> None:
        super().__init__()
        self.see = nn.Sequential(
            _conv(3 * 2**2, width, 3),
            nn.LeakyReLU(0.2),
            _conv(width, 2 * width, 4, stride=2),
            nn.LeakyReLU(0.2),
            _conv(2 * width, 4 * width, 4, stride=2),
            nn.LeakyReLU(0.2),
        )
        self.hear = nn.Sequential(_conv(latent_channels, width, 3), nn.LeakyReLU(0.2))
        self.judge = nn.Sequential(
            _conv(5 * width, 4 * width, 3), nn.LeakyReLU(0.2), _conv(4 * width, 1, 3)
        )

    def forward(self, pictures: Tensor, prediction: Tensor) -> Tensor:
        """An opinion on every patch, real (1) or painted (-1), (B, 1, H / 8, W / 8).

        Args:
            pictures: (B, 3, H, W) in [-1, 1].
            prediction: of their latents, (B, C, H / 8, W / 8).
        """
        assert pictures.shape[3] == PATCH * prediction.shape[3], "of another picture"
        gain = pictures.new_tensor([1.0, CHROMA, CHROMA])[:, None, None]
        seen = self.see(F.pixel_unshuffle(gain * luma_and_chroma(pictures), 2))
        opinion: Tensor = self.judge(torch.cat([seen, self.hear(prediction)], 1))
        # Under autocast it comes in half precision.
        return opinion.float()


def _conv(channels_in: int, channels: int, size: int, *, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(channels_in, channels, size, stride=stride, padding=(size - 1) // 2)
    normed: nn.Module = spectral_norm(conv)
    return normed
