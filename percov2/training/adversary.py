"""Adversarial finetuning of the flow for one or a few sampling steps.

A flow that is trained by squared error alone needs many steps, and much capacity, before its
pictures are as sharp as photographs. Judged in the features of an ImageNet network, against a
discriminator that learns there too, it can paint in one step: "Projected GANs converge faster"
(Sauer et al., NeurIPS 2021), applied to a student of the sampling grid as in "Adversarial
diffusion distillation" (Sauer et al., ECCV 2024), without a teacher: the tokens say enough of the
picture for the original to serve as the target. Features are compared by their local statistics,
"Wasserstein distortion" (Qiu et al., 2023): texture has to be as strong as the original's at its
place, not the same leaf by leaf, which no file of this size could tell. Fine grain escapes such
features: a second discriminator sees the pixels (`percov2.training.patch_discriminator`).

Shape legend: B batch, H and W rows and columns of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from percov2.analysis.autoencoder import Autoencoder
from percov2.efficientnet import EfficientNetLite
from percov2.synthesis.grain import add_grain
from percov2.synthesis.sharpening import sharpen
from percov2.training.checkpoint_weights import read_weights
from percov2.training.checkpointing import compare_shapes, shapes_of
from percov2.training.enlarger import Enlarger
from percov2.training.frechet_loss import FrechetLoss
from percov2.training.optimization import Optimization
from percov2.training.patch_discriminator import PatchDiscriminator
from percov2.training.picture_distances import (
    CELLS,
    LAYOUT,
    detail_distance,
    pattern_distance,
    wasserstein_distortion,
)

LEVEL_CHANNELS = (32, 24, 40, 112, 320)
"""Channels of EfficientNet-Lite0's maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution."""

LAST_FEATURES = 1280
"""Channels of its last features."""


class AdversarialLosses(NamedTuple):
    """Losses of a step, each a scalar.

    Attributes:
        pixels: mean squared difference of the pixels, to be lowered by the painter.
        layout: the same of pictures reduced to the means of LAYOUT x LAYOUT pixels: features and
            discriminator hardly see that a surface has the wrong colour, or several.
        pattern: `pattern_distance`, to be lowered by the painter.
        detail: `detail_distance`, to be lowered by the painter.
        enlarged: mean absolute difference from what a `percov2.training.enlarger.Enlarger` makes
            of the painted pictures, to be lowered by the painter; 0 without one.
        features: Wasserstein distortion of standardised features, to be lowered by the painter:
            squared differences of means and standard deviations in overlapping windows.
        frechet: see `percov2.training.frechet_loss.FrechetLoss`, of the last features' means
            in windows of CELLS x CELLS cells; to be lowered by the painter.
        realism: minus the discriminator's opinion of the painted pictures, to be lowered by the
            painter; has no gradient to the discriminator.
        texture: the same of the patch discriminator's opinion; 0 without one.
        discriminator: hinge loss, of both, to be lowered by the discriminators; has no gradient to
            the painter.
    """

    pixels: Tensor
    layout: Tensor
    pattern: Tensor
    detail: Tensor
    enlarged: Tensor
    features: Tensor
    frechet: Tensor
    realism: Tensor
    texture: Tensor
    discriminator: Tensor


class Adversary(nn.Module):
    """Discriminators, on frozen EfficientNet-Lite0 features and of pixels, and the losses' weights.

    Args:
        steps: sampling steps that the flow learns to paint in; training times are their grid's.
        flow_weight: of the flow's own squared error of the latents.
        pixel_weight: of the squared error of the pixels, in [-1, 1].
        layout_weight: of `AdversarialLosses.layout`.
        pattern_weight: of `AdversarialLosses.pattern`.
        detail_weight: of `AdversarialLosses.detail`.
        enlarged_weight: of `AdversarialLosses.enlarged`; 0 spares the network.
        feature_weight: of `AdversarialLosses.features`.
        frechet_weight: of `AdversarialLosses.frechet`.
        realism_weight: of `AdversarialLosses.realism`.
        texture_weight: of `AdversarialLosses.texture`; 0 spares the patch discriminator.
        optimization: of the discriminators.
        train_decoder: whether the autoencoder's decoder learns too. A light autoencoder blurs
            even the originals; no latents that a flow could paint would then look sharp.
        refiner_width: of a `percov2.analysis.refiner.Refiner` that the light autoencoder's decoder
            gets, if it has none; 0 adds none.
        refiner_blocks: of the same.
        channels: of a head, at most.
        patch_width: of `percov2.training.patch_discriminator.PatchDiscriminator`.
        latent_channels: of the autoencoder, for the same.
        start: checkpoint of an earlier run with an adversary, whose discriminator goes on; None
            begins a new one, which tells little in its first 200 steps. A patch discriminator
            begins anew if that run had none.

    Raises:
        ValueError: the packages of EfficientNet-Lite0, or with ``enlarged_weight`` those of
            Real-ESRGAN, are not installed; steps < 1, a negative weight, a refiner for a decoder
            that does not learn, or a checkpoint without such a discriminator.
    """

    def __init__(
        self,
        *,
        steps: int,
        flow_weight: float,
        pixel_weight: float,
        layout_weight: float,
        pattern_weight: float,
        detail_weight: float,
        enlarged_weight: float,
        feature_weight: float,
        frechet_weight: float,
        realism_weight: float,
        texture_weight: float,
        optimization: Optimization,
        train_decoder: bool,
        refiner_width: int = 0,
        refiner_blocks: int = 0,
        channels: int = 64,
        patch_width: int = 48,
        latent_channels: int = 16,
        start: Path | None = None,
    ) -> None:
        super().__init__()
        weights = {
            "flow_weight": flow_weight,
            "pixel_weight": pixel_weight,
            "layout_weight": layout_weight,
            "pattern_weight": pattern_weight,
            "detail_weight": detail_weight,
            "enlarged_weight": enlarged_weight,
            "feature_weight": feature_weight,
            "frechet_weight": frechet_weight,
            "realism_weight": realism_weight,
            "texture_weight": texture_weight,
        }
        if steps < 1:
            raise ValueError(f"steps is {steps} and must be at least 1")
        if negative := {name: weight for name, weight in weights.items() if weight < 0}:
            raise ValueError(f"{negative}: weights must not be negative")
        if (refiner_width or refiner_blocks) and not train_decoder:
            raise ValueError(
                f"refiner_width is {refiner_width} and train_decoder false: a refiner that does "
                "not learn does nothing; set train_decoder true"
            )
        self.refiner_width, self.refiner_blocks = refiner_width, refiner_blocks
        self.steps, self.optimization, self.train_decoder = steps, optimization, train_decoder
        self.flow_weight, self.pixel_weight = flow_weight, pixel_weight
        self.layout_weight = layout_weight
        self.pattern_weight, self.detail_weight = pattern_weight, detail_weight
        self.feature_weight, self.realism_weight = feature_weight, realism_weight
        self.enlarged_weight = enlarged_weight
        self.frechet_weight, self.frechet = frechet_weight, FrechetLoss(LAST_FEATURES)
        self.texture_weight, self.latent_channels = texture_weight, latent_channels
        self.patches = PatchDiscriminator(latent_channels, patch_width) if texture_weight else None
        self.heads = nn.ModuleList(_head(n, min(n, channels)) for n in LEVEL_CHANNELS)
        if start is not None:
            self._go_on_from(start)
        try:
            # In a list: frozen weights belong neither to checkpoints nor to what a strategy shards.
            self._network = [EfficientNetLite(0).to(memory_format=torch.channels_last)]
        except ModuleNotFoundError as error:
            raise ValueError(f"an adversary needs EfficientNet-Lite0: {error}") from error
        try:
            self._enlarger = [Enlarger()] if enlarged_weight else []
        except ModuleNotFoundError as error:
            raise ValueError(
                f"enlarged_weight {enlarged_weight} needs Real-ESRGAN: {error}"
            ) from error

    def prepare(self, autoencoder: Autoencoder) -> None:
        """Give the decoder its refiner, if it is to have one.

        Raises:
            ValueError: an autoencoder that takes none, or of other latents than were told.
        """
        if self.patches is not None and autoencoder.latent_channels != self.latent_channels:
            raise ValueError(
                f"adversary.latent_channels is {self.latent_channels}, the autoencoder has "
                f"{autoencoder.latent_channels}: set it to that"
            )
        if self.refiner_width or self.refiner_blocks:
            autoencoder.add_refiner(self.refiner_width, self.refiner_blocks)

    def _go_on_from(self, checkpoint: Path) -> None:
        """Take over the discriminators of a checkpoint of `percov2.training.FlowStage`."""
        weights = read_weights(checkpoint, "trained")
        for part, module in (("heads", self.heads), ("patches", self.patches)):
            prefix = f"adversary.{part}."
            found = {
                name.removeprefix(prefix): weight
                for name, weight in weights.items()
                if name.startswith(prefix)
            }
            if module is None or (part == "patches" and not found):
                continue
            expected = shapes_of(module.state_dict())
            compare_shapes(checkpoint, shapes_of(found), expected, stage="discriminator")
            module.load_state_dict(found)

    def forward(
        self, painted: Tensor, shown: Tensor, original: Tensor, prediction: Tensor
    ) -> AdversarialLosses:
        """To the losses; gradients as `AdversarialLosses` says.

        Args:
            painted: (B, 3, H, W) in [-1, 1]; pixels, layout, pattern and what enlarged pictures
                say are those of it.
            shown: the same, see `as_shown`; all else is judged by it.
            original: likewise.
            prediction: stage 1's of the latents, (B, C, H / 8, W / 8).
        """
        with torch.no_grad():
            real = [_edges(original), *self._features(original)]
            last = self._last(real[-1])
        fake = [_edges(shown), *self._features(shown)]
        frechet = self.frechet(self._last(fake[-1]), last)
        # In units of the batch's originals: no level, and no channel, drowns the others.
        units = [torch.std_mean(level, dim=(0, 2, 3), keepdim=True) for level in real]
        real, fake = (
            [
                (level - mean) / (std + 1e-3)
                for level, (std, mean) in zip(levels, units, strict=True)
            ]
            for levels in (real, fake)
        )
        features = wasserstein_distortion(fake, real)
        real, fake = real[1:], fake[1:]
        self.heads.requires_grad_(False)
        realism = -torch.stack([opinion.mean() for opinion in self._opinions(fake)]).mean()
        self.heads.requires_grad_(True)
        texture, patches = self._texture(shown, original, prediction.detach())
        detached = [level.detach() for level in fake]
        return AdversarialLosses(
            pixels=F.mse_loss(painted, original),
            layout=F.mse_loss(F.avg_pool2d(painted, LAYOUT), F.avg_pool2d(original, LAYOUT)),
            pattern=pattern_distance(painted, original),
            detail=detail_distance(shown, original),
            enlarged=self._enlarged(painted),
            features=features,
            frechet=frechet,
            realism=realism,
            texture=texture,
            discriminator=_hinge(self._opinions(real), 1)
            + _hinge(self._opinions(detached), -1)
            + patches,
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
            + self.layout_weight * losses.layout
            + self.pattern_weight * losses.pattern
            + self.detail_weight * losses.detail
            + self.enlarged_weight * losses.enlarged
            + self.feature_weight * losses.features
            + self.frechet_weight * losses.frechet
            + self.realism_weight * losses.realism
            + self.texture_weight * losses.texture
            + losses.discriminator
        )

    def _texture(
        self, painted: Tensor, original: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The patch discriminator's opinion, and its own loss; both 0 without one."""
        if self.patches is None:
            return painted.new_zeros(()), painted.new_zeros(())
        self.patches.requires_grad_(False)
        texture = -self.patches(painted, prediction).mean()
        self.patches.requires_grad_(True)
        real = self.patches(original, prediction)
        fake = self.patches(painted.detach(), prediction)
        return texture, _hinge([real], 1) + _hinge([fake], -1)

    def _enlarged(self, painted: Tensor) -> Tensor:
        """Difference from the enlarged pictures, 0 without a network that makes them."""
        if not self._enlarger:
            return painted.new_zeros(())
        return F.l1_loss(painted, self._enlarger[0].to(painted.device)(painted.detach()))

    def _features(self, pictures: Tensor) -> list[Tensor]:
        network = self._network[0].to(pictures.device)
        pictures = (pictures.float() + 1) * 127.5
        levels = network.pyramid(pictures.contiguous(memory_format=torch.channels_last))
        # Under autocast they come in half precision, in which a variance would drown in rounding.
        return [level.float() for level in levels]

    def _last(self, coarsest: Tensor) -> Tensor:
        """The last features' means in overlapping windows, (windows, LAST_FEATURES)."""
        found = self._network[0].last(coarsest).float()
        cells = min(CELLS, *found.shape[2:])
        windows = F.avg_pool2d(found, cells, stride=max(1, cells - 1))
        return windows.movedim(1, -1).flatten(0, 2)

    def _opinions(self, levels: list[Tensor]) -> list[Tensor]:
        return [head(level) for head, level in zip(self.heads, levels, strict=True)]


def as_shown(
    painted: Tensor, *, sharpness: float, grain: float, draws: Sequence[torch.Generator]
) -> Tensor:
    """Painted pictures as the decoder shows them, sharpened and with grain, to be judged so.

    Detail that sharpening strengthens need not be painted as strong as it is to be, which squared
    error would punish; what the grain covers need not be painted at all. The grain has no
    gradient: it is not the painter's to lower.

    Args:
        painted: (B, 3, H, W) in [-1, 1].
        sharpness: see `percov2.synthesis.sharpening.sharpen`.
        grain: see `percov2.synthesis.grain.add_grain`.
        draws: of the seed of each picture's grain, B of them.

    Returns:
        (B, 3, H, W), not clamped.
    """
    pictures = sharpen(painted, sharpness)
    if grain == 0:
        return pictures
    plain = pictures.detach().clamp(-1, 1)
    seeds = [int(torch.randint(2**63 - 1, (), generator=draw)) for draw in draws]
    pairs = zip(torch.split(plain, 1), seeds, strict=True)
    return pictures + torch.cat([add_grain(x, grain, seed=seed) - x for x, seed in pairs])


def _hinge(opinions: list[Tensor], sign: int) -> Tensor:
    """Hinge loss (Lim and Ye, 2017) of opinions that should be sign * 1."""
    return torch.stack([F.relu(1 - sign * opinion).mean() for opinion in opinions]).mean()


def _edges(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) and their differences across and down, (B, 9, H, W).

    The network's first layer halves the resolution: it does not see the finest of the detail.
    """
    across = F.pad(pictures.diff(dim=3), (0, 1))
    down = F.pad(pictures.diff(dim=2), (0, 0, 0, 1))
    return torch.cat([pictures, across, down], 1)


def _head(channels_in: int, channels: int) -> nn.Sequential:
    """Features of one resolution to an opinion at every place: real (1) or painted (-1)."""
    return nn.Sequential(
        spectral_norm(nn.Conv2d(channels_in, channels, 1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(channels, 1, 1)),
    )
