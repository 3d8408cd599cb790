"""Attention windows that hold the visible tokens only.

Of a group's pass over 1,536 tokens 24 may be visible, two or three a window of 144: attention of
whole windows would cost as much in the first group as in the last.
Shape legend: M visible tokens, W windows that hold some, n places of a window: as many as the
fullest window has visible tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WindowPartition:
    """Which visible token sits where in which window.

    Attributes:
        slots: (W, n) index of a visible token, or M where a window has fewer than n.
        where: (M,) position of each visible token in the flattened slots.
        y, x: (W, n) place in the window, of empty slots 0.
        side: of a window, in tokens.
    """

    slots: Tensor
    where: Tensor
    y: Tensor
    x: Tensor
    side: int

    @classmethod
    def of(cls, rows: Tensor, cols: Tensor, *, side: int, offset: int) -> WindowPartition:
        """Sort M tokens, given by their rows and columns, into windows.

        Args:
            rows: (M,) int64, at least 0.
            cols: likewise.
            side: of a window, in tokens.
            offset: rows and columns by which the first windows begin before the grid.
        """
        down, across = (rows + offset) // side, (cols + offset) // side
        window = down * (across.max() + 1) + across
        _, window, counts = torch.unique(window, return_inverse=True, return_counts=True)
        order = window.argsort(stable=True)
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(window)
        rank[order] = torch.arange(len(window), device=rows.device) - first[window[order]]
        length = int(counts.max())
        where = window * length + rank
        slots = rows.new_full((len(counts) * length,), len(rows))
        slots[where] = torch.arange(len(rows), device=rows.device)
        y, x = torch.zeros_like(slots), torch.zeros_like(slots)
        y[where], x[where] = (rows + offset) % side, (cols + offset) % side
        shape = (len(counts), length)
        return cls(slots.view(shape), where, y.view(shape), x.view(shape), side)

    @property
    def empty(self) -> Tensor:
        """(W, n) bool: slots without a token."""
        return self.slots == len(self.where)

    def part(self, windows: slice) -> WindowPartition:
        """Some of the windows; ``where`` stays that of all."""
        return WindowPartition(
            self.slots[windows], self.where, self.y[windows], self.x[windows], self.side
        )

    def offsets(self) -> Tensor:
        """(W, n, n) index, in [0, (2 side - 1)^2), of how one place lies to another."""
        down = self.y[:, :, None] - self.y[:, None, :] + self.side - 1
        across = self.x[:, :, None] - self.x[:, None, :] + self.side - 1
        return down * (2 * self.side - 1) + across
