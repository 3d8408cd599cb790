"""Euler sampling of the flow with classifier-free guidance, in overlapping tiles if large.

Shape legend: B batch (1 in the codec), C latent channels, K condition channels, h and w latent
rows and columns, T tile side in latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from percov2.synthesis.flow import Flow

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, C, h, w), condition (B, K, h, w), t (B,)) to velocity (B, C, h, w)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a large latent grid is painted.

    Attributes:
        size: side of a tile in latents, even: at most what the transformer was trained on.
        overlap: least number of latents that neighbouring tiles share, even, < size.
        batch: tiles evaluated at once; bounds memory.
    """

    size: int
    overlap: int
    batch: int = 4

    def __post_init__(self) -> None:
        if self.size % 2 or self.overlap % 2 or not 0 <= self.overlap < self.size or self.batch < 1:
            raise ValueError(
                f"tile size {self.size} and overlap {self.overlap} must be even with "
                f"0 <= overlap < size, and batch {self.batch} at least 1"
            )

    def starts(self, length: int) -> list[int]:
        """First positions of the tiles along an axis of even length: even, evenly spread."""
        assert length % 2 == 0, length
        if length <= self.size:
            return [0]
        count = -(-(length - self.overlap) // (self.size - self.overlap))
        return [2 * round(i * (length - self.size) / (count - 1) / 2) for i in range(count)]


def guided(conditional: Velocity, unconditional: Velocity, guidance: float) -> Velocity:
    """Classifier-free guidance v_u + g (v_c - v_u); g of 1 or 0 evaluates one of them only."""
    if guidance == 1:
        return conditional
    if guidance == 0:
        return unconditional

    def velocity(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        v_u = unconditional(x_t, condition, t)
        return v_u + guidance * (conditional(x_t, condition, t) - v_u)

    return velocity


def _ramp(start: int, length: int, total: int, overlap: int) -> Tensor:
    """Blending weights of a tile along an axis: rising over the overlap, never zero.

    Only from edges inside the grid: a low weight at the grid's border would give the neighbour,
    where it begins, a large share at once.
    """
    position = torch.arange(1, length + 1, dtype=torch.float32)
    weight = torch.full((length,), overlap + 1.0)
    if start > 0:
        weight = torch.minimum(weight, position)
    if start + length < total:
        weight = torch.minimum(weight, position.flip(0))
    return weight / (overlap + 1)


def tiled(velocity: Velocity, tiling: Tiling) -> Velocity:
    """The velocity of a grid of any size, blended from those of overlapping tiles.

    A grid that fits in one tile is evaluated whole. Velocities are blended at every step, so
    neighbouring tiles stay consistent and no seam shows; memory is that of ``tiling.batch`` tiles.
    """

    def blended(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        rows, cols = x_t.shape[-2:]
        corners = [(y, x) for y in tiling.starts(rows) for x in tiling.starts(cols)]
        if len(corners) == 1:
            return velocity(x_t, condition, t)
        height, width = min(tiling.size, rows), min(tiling.size, cols)
        total, weights = torch.zeros_like(x_t), torch.zeros_like(x_t[:1, :1])
        for first in range(0, len(corners), tiling.batch):
            chosen = corners[first : first + tiling.batch]
            cut = [(..., slice(y, y + height), slice(x, x + width)) for y, x in chosen]
            parts = velocity(
                torch.cat([x_t[c] for c in cut]),
                torch.cat([condition[c] for c in cut]),
                t.repeat(len(cut)),
            ).chunk(len(cut))
            for (y, x), c, part in zip(chosen, cut, parts, strict=True):
                weight = torch.outer(
                    _ramp(y, height, rows, tiling.overlap), _ramp(x, width, cols, tiling.overlap)
                ).to(x_t)
                total[c] += weight * part
                weights[c] += weight
        return total / weights

    return blended


@torch.no_grad()
def sample(flow: Flow, velocity: Velocity, condition: Tensor, x_1: Tensor, *, steps: int) -> Tensor:
    """Follow the flow from x_1 (B, C, h, w) at t = 1 to the data at t = 0 by Euler steps.

    Args:
        flow: gives the times.
        velocity: the network, guided and tiled as wanted.
        condition: (B, K, h, w).
        x_1: the source.
        steps: number of evaluations, at least 1.

    Returns:
        x_0 (B, C, h, w).
    """
    grid = flow.time_grid(steps)
    x_t = x_1
    for now, later in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        t = torch.full((x_t.shape[0],), now, device=x_t.device, dtype=x_t.dtype)
        x_t = x_t + (later - now) * velocity(x_t, condition, t)
    return x_t
