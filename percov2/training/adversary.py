"""Adversarial finetuning of the flow for one or a few sampling steps.

A flow that is trained by squared error alone needs many steps, and much capacity, before its
pictures are as sharp as photographs. Judged in the features of an ImageNet network, against a
discriminator that learns there too, it can paint in one step: "Projected GANs converge faster"
(Sauer et al., NeurIPS 2021), applied to a student of the sampling grid as in "Adversarial
diffusion distillation" (Sauer et al., ECCV 2024), without a teacher: the tokens say enough of the
picture for the original to serve as the target. Features are compared by their local statistics,
"Wasserstein distortion" (Qiu et al., 2023): texture has to be as strong as the original's at its
place, not the same leaf by leaf, which no file of this size could tell.

Shape legend: B batch, H and W rows and columns of pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from percov2.efficientnet import EfficientNetLite
from percov2.training.checkpoint_weights import read_weights
from percov2.training.checkpointing import compare_shapes, shapes_of
from percov2.training.feature_moments import FeatureMoments
from percov2.training.optimization import Optimization

LEVEL_CHANNELS = (32, 24, 40, 112, 320)
"""Channels of EfficientNet-Lite0's maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the resolution."""

LAST_FEATURES = 1280
"""Channels of its last features."""

WINDOW = 16
"""Rows and columns of pixels in which features are compared by their statistics."""

CELLS = 4
"""Rows and columns of a map's cells in a window, at least: a deep feature compared cell by cell
would have to be at its place, where no file of this size could tell it to be."""

LAYOUT = 8
"""Rows and columns of pixels whose mean colour counts by itself."""

BANDS = 3
"""Octaves of detail whose strength is compared, from the finest."""

BT601 = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)
"""Rows: Y, Cb and Cr of red, green and blue (ITU-R BT.601, as in JFIF: most photographs were JPEGs,
whose chroma is free of fine detail in these axes; CompressAI's conversion has those of BT.709)."""

PERIOD = 16
"""Pixels of the coarsest patch that a network puts out: a transformer's, of 2x2 latents."""


class AdversarialLosses(NamedTuple):
    """Losses of a step, each a scalar.

    Attributes:
        pixels: mean squared difference of the pixels, to be lowered by the painter.
        layout: the same of pictures reduced to the means of LAYOUT x LAYOUT pixels: features and
            discriminator hardly see that a surface has the wrong colour, or several.
        pattern: `pattern_distance`, to be lowered by the painter.
        detail: `detail_distance`, to be lowered by the painter.
        features: Wasserstein distortion of standardised features, to be lowered by the painter:
            squared differences of means and standard deviations in overlapping windows.
        moments: see `percov2.training.feature_moments.FeatureMoments`, of the last features' means
            in windows of CELLS x CELLS cells; to be lowered by the painter.
        realism: minus the discriminator's opinion of the painted pictures, to be lowered by the
            painter; has no gradient to the discriminator.
        discriminator: hinge loss, to be lowered by the discriminator; has no gradient to the
            painter.
    """

    pixels: Tensor
    layout: Tensor
    pattern: Tensor
    detail: Tensor
    features: Tensor
    moments: Tensor
    realism: Tensor
    discriminator: Tensor


class Adversary(nn.Module):
    """Discriminator heads on frozen EfficientNet-Lite0 features, and how their losses are weighed.

    Args:
        steps: sampling steps that the flow learns to paint in; training times are their grid's.
        flow_weight: of the flow's own squared error of the latents.
        pixel_weight: of the squared error of the pixels, in [-1, 1].
        layout_weight: of `AdversarialLosses.layout`.
        pattern_weight: of `AdversarialLosses.pattern`.
        detail_weight: of `AdversarialLosses.detail`.
        feature_weight: of `AdversarialLosses.features`.
        moments_weight: of `AdversarialLosses.moments`.
        realism_weight: of `AdversarialLosses.realism`.
        optimization: of the discriminator.
        train_decoder: whether the autoencoder's decoder learns too. A light autoencoder blurs
            even the originals; no latents that a flow could paint would then look sharp.
        refiner_width: of a `percov2.analysis.refiner.Refiner` that the light autoencoder's decoder
            gets, if it has none; 0 adds none.
        channels: of a head, at most.
        start: checkpoint of an earlier run with an adversary, whose discriminator goes on; None
            begins a new one, which tells little in its first 200 steps.

    Raises:
        ValueError: EfficientNet-Lite0's packages are not installed; steps < 1, a negative weight,
            a refiner for a decoder that does not learn, or a checkpoint without such a
            discriminator.
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
        feature_weight: float,
        moments_weight: float,
        realism_weight: float,
        optimization: Optimization,
        train_decoder: bool,
        refiner_width: int = 0,
        channels: int = 64,
        start: Path | None = None,
    ) -> None:
        super().__init__()
        weights = {
            "flow_weight": flow_weight,
            "pixel_weight": pixel_weight,
            "layout_weight": layout_weight,
            "pattern_weight": pattern_weight,
            "detail_weight": detail_weight,
            "feature_weight": feature_weight,
            "moments_weight": moments_weight,
            "realism_weight": realism_weight,
        }
        if steps < 1:
            raise ValueError(f"steps is {steps} and must be at least 1")
        if negative := {name: weight for name, weight in weights.items() if weight < 0}:
            raise ValueError(f"{negative}: weights must not be negative")
        if refiner_width and not train_decoder:
            raise ValueError(
                f"refiner_width is {refiner_width} and train_decoder false: a refiner that does "
                "not learn does nothing; set train_decoder true"
            )
        self.refiner_width = refiner_width
        self.steps, self.optimization, self.train_decoder = steps, optimization, train_decoder
        self.flow_weight, self.pixel_weight = flow_weight, pixel_weight
        self.layout_weight = layout_weight
        self.pattern_weight, self.detail_weight = pattern_weight, detail_weight
        self.feature_weight, self.realism_weight = feature_weight, realism_weight
        self.moments_weight, self.moments = moments_weight, FeatureMoments(LAST_FEATURES)
        self.heads = nn.ModuleList(_head(n, min(n, channels)) for n in LEVEL_CHANNELS)
        if start is not None:
            self._go_on_from(start)
        try:
            # In a list: frozen weights belong neither to checkpoints nor to what a strategy shards.
            self._network = [EfficientNetLite(0).to(memory_format=torch.channels_last)]
        except ModuleNotFoundError as error:
            raise ValueError(f"an adversary needs EfficientNet-Lite0: {error}") from error

    def _go_on_from(self, checkpoint: Path) -> None:
        """Take over the discriminator of a checkpoint of `percov2.training.FlowStage`."""
        prefix = "adversary.heads."
        weights = {
            name.removeprefix(prefix): weight
            for name, weight in read_weights(checkpoint, "trained").items()
            if name.startswith(prefix)
        }
        expected = shapes_of(self.heads.state_dict())
        compare_shapes(checkpoint, shapes_of(weights), expected, stage="discriminator")
        self.heads.load_state_dict(weights)

    def forward(self, painted: Tensor, original: Tensor) -> AdversarialLosses:
        """Pictures (B, 3, H, W) in [-1, 1] to the losses; gradients as `AdversarialLosses` says."""
        with torch.no_grad():
            real = [_edges(original), *self._features(original)]
            last = self._last(real[-1])
        fake = [_edges(painted), *self._features(painted)]
        moments = self.moments(self._last(fake[-1]), last)
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
        detached = [level.detach() for level in fake]
        return AdversarialLosses(
            pixels=F.mse_loss(painted, original),
            layout=F.mse_loss(F.avg_pool2d(painted, LAYOUT), F.avg_pool2d(original, LAYOUT)),
            pattern=pattern_distance(painted, original),
            detail=detail_distance(painted, original),
            features=features,
            moments=moments,
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
            + self.layout_weight * losses.layout
            + self.pattern_weight * losses.pattern
            + self.detail_weight * losses.detail
            + self.feature_weight * losses.features
            + self.moments_weight * losses.moments
            + self.realism_weight * losses.realism
            + losses.discriminator
        )

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

    def _hinge(self, levels: list[Tensor], sign: int) -> Tensor:
        """Hinge loss (Lim and Ye, 2017) of pictures that should be called sign * 1."""
        return torch.stack([F.relu(1 - sign * x).mean() for x in self._opinions(levels)]).mean()


def wasserstein_distortion(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Mean squared difference of local means and standard deviations, a scalar.

    Args:
        a: maps (B, K, H / s, W / s) of halving resolution, s = 1, 2, 4 ...; windows are of WINDOW
            pixels, of CELLS cells at least, and never larger than the map.
        b: maps of the same shapes.
    """
    distances = []
    for level, (one, other) in enumerate(zip(a, b, strict=True)):
        cells = min(max(WINDOW >> level, CELLS), *one.shape[2:])
        means, deviations = zip(*(_local_moments(x, cells) for x in (one, other)), strict=True)
        distances.append(F.mse_loss(*means) + F.mse_loss(*deviations))
    return torch.stack(distances).mean()


def _local_moments(level: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation in windows of cells x cells that overlap by half."""
    stride = max(cells // 2, 1)
    mean = F.avg_pool2d(level, cells, stride=stride)
    variance = F.avg_pool2d(level.square(), cells, stride=stride) - mean.square()
    # The root's slope has no bound at zero.
    return mean, (variance.clamp_min(0) + 1e-2).sqrt()


def pattern_distance(painted: Tensor, original: Tensor) -> Tensor:
    """What repeats from patch to patch in pictures (B, 3, H, W), a scalar.

    Networks that put out patches find texture most easily in a pattern that they repeat in every
    patch, which the statistics of features hardly tell from texture. Photographs have none: the
    mean of the patches of a neighbourhood is nearly flat. Compared are these means, in units of
    the detail that the original has in the neighbourhood, since a pattern is seen where there is
    none.
    """
    (found, _), (wanted, detail) = _repeated(painted), _repeated(original)
    return ((found - wanted).square().mean(1, keepdim=True) / (detail + 1e-3)).mean()


def detail_distance(painted: Tensor, original: Tensor) -> Tensor:
    """How unlike the strength of detail is in pictures (B, 3, H, W), a scalar.

    Squared error makes a painter weaken detail that it cannot know, by half in the octaves between
    3 and 16 pixels a period, and features hardly tell. Compared is the logarithm of the root mean
    square of each octave of a Laplacian pyramid (Burt and Adelson, 1983) in overlapping windows,
    of luma and of either chroma: twice as strong is as wrong as half, in the sky as in foliage.
    """
    painted, original = luma_and_chroma(painted), luma_and_chroma(original)
    distances = []
    for level in range(BANDS):
        cells = max(WINDOW >> level, 8)
        (painted, one), (original, other) = (
            _halve(pictures, cells) for pictures in (painted, original)
        )
        distances.append(F.mse_loss(one, other))
    return torch.stack(distances).mean()


def luma_and_chroma(pictures: Tensor) -> Tensor:
    """Red, green and blue (B, 3, H, W) to Y, Cb and Cr in the same units, float32, by BT.601.

    In photographs nearly all fine detail is luma. Measured in red, green and blue, a coloured grain
    ten times as strong as the original's chroma passes for it.
    """
    weights = torch.tensor(BT601, device=pictures.device)[..., None, None]
    # Not as a matrix product: under autocast that would round to half precision.
    return (weights * pictures.float()[:, None]).sum(2)


def _halve(pictures: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) at half the resolution, and how strong the detail is that they lose:
    the logarithm of its root mean square in windows of cells x cells that overlap by half."""
    half = F.avg_pool2d(pictures, 2, ceil_mode=True)
    lost = pictures - F.interpolate(half, pictures.shape[2:], mode="bilinear")
    # One grey level and a quarter: what is weaker is not seen.
    return half, 0.5 * (F.avg_pool2d(lost.square(), cells, stride=cells // 2) + 1e-4).log()


def _repeated(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean, and mean square, over neighbouring patches of deviations from the patch's mean."""
    rows, cols = (side // PERIOD * PERIOD for side in pictures.shape[2:])
    patches = F.pixel_unshuffle(pictures[..., :rows, :cols], PERIOD)
    patches = patches.view(len(pictures), 3, PERIOD**2, *patches.shape[2:])
    deviations = (patches - patches.mean(2, keepdim=True)).flatten(1, 2)
    near = min(5, *deviations.shape[2:])
    means, squares = (
        F.avg_pool2d(x, near, stride=max(1, near // 2))
        for x in (deviations, deviations.square().mean(1, keepdim=True))
    )
    return means, squares


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
