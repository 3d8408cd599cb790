"""Local contrast of painted pictures.

Shape legend: B batch, H and W rows and columns of pixels.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

_SIDE = 5
"""Of the squares whose means count as the picture without detail. By features of two networks 5 is
a little better than 3 and as good as 7; see docs/experiments.md."""


def check_amount(name: str, amount: float) -> None:
    """Refuse an amount of sharpness, of grain or of guidance that there cannot be.

    Raises:
        ValueError: negative, infinite or not a number.
    """
    if not 0 <= amount < math.inf:
        raise ValueError(f"{name} is {amount}: it must be at least 0 and finite")


def local_mean(images: Tensor, side: int) -> Tensor:
    """Means of squares around each pixel, of what there is of them at the border.

    Args:
        images: (B, C, H, W).
        side: of the squares in pixels, odd.

    Returns:
        (B, C, H, W).
    """
    return F.avg_pool2d(images, side, stride=1, padding=side // 2, count_include_pad=False)


def sharpen(images: Tensor, amount: float) -> Tensor:
    """Unsharp masking: add a share of what sets each pixel apart from its neighbourhood.

    A painter that is also judged by squared error weakens detail that the tokens leave open, the
    finest most. Painting more of its residual (`percov2.synthesis.flow.Flow.gain`) strengthens
    whatever it invents; this strengthens edges and texture alike, at less loss of fidelity.

    Args:
        images: (B, 3, H, W), in any unit.
        amount: the share; 0 leaves pictures as they are.

    Returns:
        (B, 3, H, W), not clamped. At the border the neighbourhood is what there is of it.
    """
    if amount == 0:  # most models': a large picture need not be in memory thrice for it
        return images
    return images.lerp(local_mean(images, _SIDE), -amount)
