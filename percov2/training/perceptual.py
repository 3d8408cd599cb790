"""LPIPS as a training loss (Zhang et al., CVPR 2018), through torchmetrics' networks."""

from __future__ import annotations

from typing import Literal
from urllib.error import URLError

from torch import Tensor, nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

LpipsNet = Literal["alex", "vgg", "squeeze"]


class PerceptualLoss:
    """Mean LPIPS of two batches of pictures, with gradient to the first.

    The backbone's ImageNet weights are torchvision's: fetched once, then read from torch's hub
    cache. Not a module on purpose: its frozen weights belong neither to checkpoints nor to what a
    strategy shards.

    Args:
        net: backbone.

    Raises:
        ValueError: the weights are neither cached nor to be had.
    """

    def __init__(self, net: LpipsNet) -> None:
        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type=net)
        except URLError as error:
            raise ValueError(
                f"cannot fetch the ImageNet weights of {net!r} for LPIPS ({error}): run once with "
                "network access, set TORCH_HOME to a cache that holds them, or set lpips_weight 0"
            ) from error
        self.net: nn.Module = metric.net.requires_grad_(False)

    def __call__(self, picture: Tensor, reference: Tensor) -> Tensor:
        """Two batches (B, 3, H, W) in [-1, 1], at least 64 pixels a side, to a scalar."""
        self.net.to(picture.device)
        loss: Tensor = self.net(picture.float(), reference.float()).mean()
        return loss
