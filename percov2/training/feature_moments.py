"""How far a network's features of painted pictures are, as a whole, from those of the originals.

Shape legend: N windows of the step, D features.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

DECAY = 0.98
"""Of the averages: they hold the windows of the last fifty steps or so."""


class FeatureMoments(nn.Module):
    """Fréchet distance of two Gaussians without covariances, of running means and variances.

    Comparing pairs draws features to the mean of what a file may stand for, and a discriminator
    says of one picture only that it is painted. What all painted pictures have in common, a
    texture too much or an object's look too little, shows in the means over many of them. A step
    has far too few windows to tell, so values are those of the running averages, with the gradient
    that the step's own windows have in an average over all.

    Args:
        features: D.
    """

    moments: Tensor
    steps: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        # Painted and original; first and second moment; features. Zero before the first step.
        self.register_buffer("moments", torch.zeros(2, 2, features))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, painted: Tensor, original: Tensor) -> Tensor:
        """Features (N, D) each, to the distance as a share of the originals' variance, a scalar.

        Every process takes part, with its own windows.
        """
        found = torch.stack([_moments(x.float()) for x in (painted, original)])
        with torch.no_grad():
            shared = found.detach().clone()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(shared)
                shared /= dist.get_world_size()
            self.moments.lerp_(shared, 1 - DECAY)
            self.steps.add_(1)
            # Of the zeros from which the averages began nothing is left.
            running = self.moments / (1 - DECAY ** self.steps.float())
        mean, square = (running + found - found.detach()).unbind(1)
        # Constant features have no variance, and the root's slope has no bound at zero.
        variance = (square - mean.square()).clamp_min(0) + 1e-6
        apart = (mean[0] - mean[1]).square() + (variance[0].sqrt() - variance[1].sqrt()).square()
        return apart.sum() / variance[1].sum().detach()


def _moments(features: Tensor) -> Tensor:
    """(N, D) to first and second moment, (2, D)."""
    return torch.stack([features.mean(0), features.square().mean(0)])
