"""Images to latents and back: SD3's autoencoder, and the light one of the embedded default.

Shape legend: B batch, H and W image rows and columns in pixels (multiples of 8),
h = H / 8 and w = W / 8 latent rows and columns, C latent channels (16).
Images are float tensors in [-1, 1], channels R, G, B (sRGB).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from percov2.analysis.refiner import Refiner
from percov2.layers import ResidualBlock, zeroed
from percov2.model_store import PATCH


class Autoencoder(nn.Module, ABC):
    """What the codec and the training stages need of an autoencoder."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the latents (16 for SD3)."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The weights of `decode` that finetuning may change without touching `encode`."""

    @property
    def refiner_width(self) -> int:
        """Of the decoder's `Refiner`; 0 without one."""
        return 0

    @property
    def refiner_blocks(self) -> int:
        """Of the decoder's `Refiner`; 0 without one."""
        return 0

    def add_refiner(self, width: int, blocks: int) -> None:
        """Make a `Refiner` part of the decoder, if it has none yet.

        Raises:
            ValueError: it has one of another size, or this kind takes none.
        """
        raise ValueError(
            f"refiner_width is {width}: only the light autoencoder takes a refiner; set it to 0"
        )

    @abstractmethod
    def encode(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W) in [-1, 1] to scaled latents (B, C, H / 8, W / 8); repeatable."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) to image (B, 3, 8 h, 8 w), about [-1, 1], not clamped."""


def _check_image(image: Tensor) -> None:
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % PATCH or image.shape[3] % PATCH:
        raise ValueError(
            f"image has shape {tuple(image.shape)}: expected (B, 3, H, W) with H and W multiples "
            f"of {PATCH}; pad it first"
        )


class StableDiffusionAutoencoder(Autoencoder):
    """SD3's ``AutoencoderKL`` behind the codec's interface.

    Latents are ``(z - shift_factor) * scaling_factor`` with ``z`` the *mode* of the encoder's
    distribution: a sample would make encoding unrepeatable. This class is the only place that
    knows the two factors.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        if factor != PATCH:
            raise ValueError(
                f"this AutoencoderKL reduces by {factor}, percov2 needs {PATCH}: "
                "use SD3's or another with four resolution levels"
            )
        # Beyond its training size the decoder's attention would not fit in memory: tiles there.
        vae.enable_tiling()
        self.vae = vae
        shift = vae.config.shift_factor
        self.shift_factor = 0.0 if shift is None else float(shift)
        self.scaling_factor = float(vae.config.scaling_factor)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.vae.config.latent_channels)

    @property
    def decoder(self) -> nn.Module:
        """See `Autoencoder.decoder`."""
        decoder: nn.Module = self.vae.decoder
        return decoder

    def encode(self, image: Tensor) -> Tensor:
        """See `Autoencoder.encode`."""
        _check_image(image)
        mode: Tensor = self.vae.encode(image).latent_dist.mode()
        return (mode - self.shift_factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        image: Tensor = self.vae.decode(latents / self.scaling_factor + self.shift_factor).sample
        return image


def _residual_net(channels_in: int, width: int, blocks: int, channels_out: int) -> nn.Sequential:
    """A small convolutional net whose output is zero at initialisation."""
    last = zeroed(nn.Conv2d(width, channels_out, 1))
    return nn.Sequential(
        nn.Conv2d(channels_in, width, 1),
        nn.SiLU(),
        *(ResidualBlock(width) for _ in range(blocks)),
        nn.SiLU(),
        last,
    )


class PatchAutoencoder(Autoencoder, ModelMixin, ConfigMixin):
    """Principal components of 8x8x3 patches plus a learned residual on both sides.

    The linear part alone, 16 components, gives 28.8 dB on Kodak; the residual networks start at
    zero, so training can only add to that. A latent channel is its component divided by the
    square root of the component's standard deviation and by a common scalar that brings the mean
    square over channels to 1: half-way whitening, so that neither does the mean of a patch drown
    the rest nor does the flow spend its noise on components that nobody sees.

    Args:
        latent_channels: number of components kept.
        encoder_width: channels of the residual network before the latents.
        encoder_blocks: its residual blocks.
        decoder_width: channels of the residual network after the latents.
        decoder_blocks: its residual blocks.
        refiner_width: channels of `Refiner` at half the resolution; 0 leaves it out.
        refiner_blocks: of `Refiner`; 0 without one.
    """

    config: Any
    mean: Tensor
    components: Tensor
    scale: Tensor
    refiner: Refiner | None

    @register_to_config
    def __init__(
        self,
        *,
        latent_channels: int,
        encoder_width: int,
        encoder_blocks: int,
        decoder_width: int,
        decoder_blocks: int,
        refiner_width: int = 0,
        refiner_blocks: int = 0,
    ) -> None:
        super().__init__()
        dim = 3 * PATCH * PATCH
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("components", torch.eye(dim)[:latent_channels].clone())
        self.register_buffer("scale", torch.ones(latent_channels))
        self.encoder_residual = _residual_net(dim, encoder_width, encoder_blocks, latent_channels)
        self.decoder_residual = _residual_net(latent_channels, decoder_width, decoder_blocks, dim)
        self.refiner = (
            Refiner(latent_channels, refiner_width, refiner_blocks)
            if refiner_width or refiner_blocks
            else None
        )

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.config.latent_channels)

    @property
    def decoder(self) -> nn.Module:
        """See `Autoencoder.decoder`: all but the components, which serve both directions."""
        parts: dict[str, nn.Module] = {"residual": self.decoder_residual}
        if self.refiner is not None:
            parts["refiner"] = self.refiner
        return nn.ModuleDict(parts)

    @property
    def refiner_width(self) -> int:
        """See `Autoencoder.refiner_width`."""
        return int(self.config.refiner_width)

    @property
    def refiner_blocks(self) -> int:
        """See `Autoencoder.refiner_blocks`."""
        return int(self.config.refiner_blocks)

    def add_refiner(self, width: int, blocks: int) -> None:
        """See `Autoencoder.add_refiner`."""
        found = {"refiner_width": self.refiner_width, "refiner_blocks": self.refiner_blocks}
        wanted = {"refiner_width": width, "refiner_blocks": blocks}
        if self.refiner is None:
            self.refiner = Refiner(self.latent_channels, width, blocks)
            self.register_to_config(**wanted)  # type: ignore[operator]
        elif found != wanted:
            raise ValueError(
                f"the refiner is to have {wanted}, this autoencoder's has {found}: use the same, "
                "or start from a model without a refiner"
            )

    def encode(self, image: Tensor) -> Tensor:
        """See `Autoencoder.encode`."""
        _check_image(image)
        patches = nn.functional.pixel_unshuffle(image, PATCH) - self.mean[:, None, None]
        linear = torch.einsum("bphw,cp->bchw", patches, self.components)
        latents: Tensor = linear / self.scale[:, None, None] + self.encoder_residual(patches)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """See `Autoencoder.decode`."""
        components = latents * self.scale[:, None, None]
        patches = torch.einsum("bchw,cp->bphw", components, self.components)
        patches = patches + self.mean[:, None, None] + self.decoder_residual(latents)
        picture = nn.functional.pixel_shuffle(patches, PATCH)
        return picture if self.refiner is None else self.refiner(latents, picture)

    @torch.no_grad()
    def fit_principal_components(self, images: list[Tensor]) -> None:
        """Set the linear part from the patches of the images, each (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: not more patches than components (n patches span n - 1 of them).
        """
        dim = self.mean.numel()
        patches = torch.cat(
            [
                nn.functional.pixel_unshuffle(image, PATCH).movedim(1, -1).reshape(-1, dim).cpu()
                for image in images
            ]
        ).double()  # on the CPU: mps has no float64
        if patches.shape[0] <= self.latent_channels:
            raise ValueError(
                f"{patches.shape[0]} patches cannot give {self.latent_channels} components: "
                "pass more images"
            )
        mean = patches.mean(0)
        variances, vectors = torch.linalg.eigh(torch.cov(patches.T))
        order = variances.argsort(descending=True)[: self.latent_channels]
        components = vectors[:, order].T
        # The sign of an eigenvector is arbitrary; fixing it makes refitting repeatable.
        components = torch.where(components.sum(1, keepdim=True) < 0, -components, components)
        deviations = variances[order].clamp_min(1e-12).sqrt()
        scale = deviations.sqrt() * deviations.mean().sqrt()
        self.mean.copy_(mean)
        self.components.copy_(components)
        self.scale.copy_(scale)
