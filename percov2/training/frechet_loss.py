"""How far a network's features of painted pictures are, as a whole, from those of the originals.

Shape legend: N windows of the step, D features.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

DECAY = (0.995, 0.998)
"""Of the averages of painted and of original windows. A covariance takes many windows; a painter
that moves faster than its average hears too late that it has arrived, and overshoots."""

WARM_UP = 100
"""Steps after which the averages hold enough windows for a covariance."""

REFRESH = 20
"""Steps between two transports: two decompositions of a D x D matrix each."""

RIDGE = 0.01
"""Share of the originals' mean variance that is added to every variance, against the noise of
covariances of few windows."""


class FrechetLoss(nn.Module):
    """Fréchet distance of Gaussians of running means and covariances (Dowson and Landau, 1982).

    Comparing pairs draws features to the mean of what a file may stand for, and a discriminator
    says of one picture only that it is painted. What all painted pictures have in common, a
    texture too much or an object's look too little, shows in the statistics of many of them: the
    features' variance lies in other directions than a photograph's. A step has far too few windows
    to tell. The distance's gradient by one window, though, leads straight from its features to
    where the optimal transport between the two Gaussians takes them, and the transport is that of
    the running averages. The value is the mean squared way, which over many windows is the
    distance. Up to step WARM_UP only the means are transported.

    Args:
        features: D.
    """

    means: Tensor
    squares: Tensor
    steps: Tensor
    transport: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        # Painted and original; zero before the first step.
        self.register_buffer("means", torch.zeros(2, features))
        self.register_buffer("squares", torch.zeros(2, features, features))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("transport", torch.eye(features))

    def forward(self, painted: Tensor, original: Tensor) -> Tensor:
        """Features (N, D) each, to the distance as a share of the originals' variance, a scalar.

        Every process takes part, with its own windows.
        """
        # Under autocast the products would be in half precision.
        with torch.autocast(painted.device.type, enabled=False):
            return self._distance(painted.float(), original.float())

    def _distance(self, painted: Tensor, original: Tensor) -> Tensor:
        with torch.no_grad():
            self._take_in(painted, original)
            steps = int(self.steps)
            # Of the zeros from which the averages began nothing is left.
            begun = torch.tensor([1 - decay**steps for decay in DECAY]).to(self.means)
            means = self.means / begun[:, None]
            variance = (self.squares[1].trace() / begun[1] - means[1].square().sum()).clamp_min(
                1e-6
            )
            if steps >= WARM_UP and steps % REFRESH == 0:
                squares = self.squares / begun[:, None, None]
                covariances = squares - means[:, :, None] * means[:, None, :]
                if covariances.device.type == "mps":  # has no float64
                    covariances = covariances.cpu()
                self.transport.copy_(_transport(*covariances.double()))
            wanted = means[1] + (painted - means[0]) @ self.transport
        return (painted - wanted).square().sum(1).mean() / variance

    def _take_in(self, painted: Tensor, original: Tensor) -> None:
        """Move the averages by this step's windows, of all processes."""
        both = torch.stack([painted, original])
        means, squares = both.mean(1), both.mT @ both / both.shape[1]
        if dist.is_available() and dist.is_initialized():
            for shared in (means, squares):
                dist.all_reduce(shared)
                shared /= dist.get_world_size()
        for i, decay in enumerate(DECAY):
            self.means[i].lerp_(means[i], 1 - decay)
            self.squares[i].lerp_(squares[i], 1 - decay)
        self.steps.add_(1)


def _transport(found: Tensor, wanted: Tensor) -> Tensor:
    """The symmetric matrix that takes a Gaussian of covariance (D, D) to another, both centred.

    ``W^(1/2) (W^(1/2) F W^(1/2))^(-1/2) W^(1/2)`` (Dowson and Landau, 1982).
    """
    ridge = RIDGE * wanted.trace() / len(wanted) * torch.eye(len(wanted)).to(wanted)
    root = _power(wanted + ridge, 0.5)
    return root @ _power(root @ (found + ridge) @ root, -0.5) @ root


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Of a symmetric, positive matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    powers = values.clamp_min(1e-12).pow(exponent)
    result: Tensor = (vectors * powers) @ vectors.mT
    return result
