"""How unlike painted pictures are to the originals, in what a file of this size can tell.

Shape legend: B batch, H and W rows and columns of pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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

SPECTRUM = 16
"""Rows and columns of pixels of a window whose spectrum counts."""

CLASSES = 8
"""Of windows, by the strength of the original's detail there; their mean spectra are compared."""

PERIOD = 16
"""Pixels of the coarsest patch that a network puts out: a transformer's, of 2x2 latents."""


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
    square of each octave of a Laplacian pyramid (Burt and Adelson, 1983), of luma and of either
    chroma, in overlapping windows: twice as strong is as wrong as half, in the sky as in foliage.

    The best guess of a logarithm is that of a geometric mean, so a painter who guesses well in
    every window has too little detail on the whole; and a ripple of one frequency is as strong as
    a texture. So the logarithms of mean power spectra are compared too, over all windows of the
    batch whose originals have about as much detail.
    """
    painted, original = luma_and_chroma(painted), luma_and_chroma(original)
    spectrum = _spectrum_distance(painted, original)
    distances = []
    for level in range(BANDS):
        cells = max(WINDOW >> level, 8)
        (painted, one), (original, other) = (
            _halve(pictures, cells) for pictures in (painted, original)
        )
        distances.append(F.mse_loss(_strength(one), _strength(other)))
    return (torch.stack(distances).mean() + spectrum) / 2


def luma_and_chroma(pictures: Tensor) -> Tensor:
    """Red, green and blue (B, 3, H, W) to Y, Cb and Cr in the same units, float32, by BT.601.

    In photographs nearly all fine detail is luma. Measured in red, green and blue, a coloured grain
    ten times as strong as the original's chroma passes for it.
    """
    weights = torch.tensor(BT601, device=pictures.device)[..., None, None]
    # Not as a matrix product: under autocast that would round to half precision.
    return (weights * pictures.float()[:, None]).sum(2)


def _halve(pictures: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Pictures (B, 3, H, W) at half the resolution, and the mean square of the detail that they
    lose, in windows of cells x cells that overlap by half."""
    half = F.avg_pool2d(pictures, 2, ceil_mode=True)
    lost = pictures - F.interpolate(half, pictures.shape[2:], mode="bilinear")
    return half, F.avg_pool2d(lost.square(), cells, stride=cells // 2)


def _spectrum_distance(painted: Tensor, original: Tensor) -> Tensor:
    """Mean squared difference of the logarithms of mean spectra, class by class, a scalar."""
    found, wanted = _power(painted), _power(original)
    classes = wanted[:, 0].mean(1).argsort().chunk(CLASSES)
    return torch.stack(
        [
            F.mse_loss(_strength(found[windows].mean(0)), _strength(wanted[windows].mean(0)))
            for windows in classes
        ]
    ).mean()


def _power(pictures: Tensor) -> Tensor:
    """Power at periods of half a window and less (windows, 3, frequencies), that of white noise
    being its mean square at each, in windows (Hann's) that overlap by half."""
    hann = torch.hann_window(SPECTRUM, device=pictures.device)
    hann = hann[:, None] * hann
    step = SPECTRUM // 2
    windows = pictures.unfold(2, SPECTRUM, step).unfold(3, SPECTRUM, step)
    windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    windows = (windows - windows.mean((-2, -1), keepdim=True)) * hann
    power: Tensor = torch.fft.rfft2(windows).abs().square() / hann.square().sum()
    down = torch.fft.fftfreq(SPECTRUM, device=pictures.device)[:, None]
    across = torch.fft.rfftfreq(SPECTRUM, device=pictures.device)
    fine = torch.hypot(down, across) >= 2 / SPECTRUM
    return power[..., fine]


def _strength(square: Tensor) -> Tensor:
    """Mean squares of detail to the logarithms of their roots."""
    # One grey level and a quarter: what is weaker is not seen.
    return 0.5 * (square + 1e-4).log()


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
