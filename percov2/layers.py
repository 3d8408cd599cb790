"""Layers that more than one package uses."""

from __future__ import annotations

from torch import Tensor, nn


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """Set weights and bias to zero; returns the layer."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a SiLU, added to the input; the second starts at zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) to the same shape."""
        out: Tensor = x + self.body(x)
        return out
