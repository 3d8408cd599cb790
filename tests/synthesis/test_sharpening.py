from __future__ import annotations

import pytest
import torch

from percov2.evaluation.pixel_metrics import gradient_energy
from percov2.synthesis.sharpening import sharpen


@pytest.mark.parametrize("amount", [0.0, 0.2, 1.5])
def test_a_share_of_the_deviation_from_the_neighbourhood_is_added(amount: float) -> None:
    images = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    expected = images.clone()
    for row in range(9):
        for col in range(7):
            near = images[..., max(row - 2, 0) : row + 3, max(col - 2, 0) : col + 3]
            expected[..., row, col] += amount * (images[..., row, col] - near.mean((-2, -1)))
    torch.testing.assert_close(sharpen(images, amount), expected)


def test_nothing_is_added_by_zero_nor_to_a_surface() -> None:
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sharpen(images, 0.0), images)
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(sharpen(flat, 2.0), flat)


def test_a_soft_edge_gets_steeper_and_keeps_its_sides() -> None:
    edge = torch.linspace(-1, 1, 8).clamp(-0.4, 0.4).repeat_interleave(2).expand(1, 3, 16, 16)
    sharper = sharpen(edge, 0.5)
    assert gradient_energy(sharper) > 1.1 * gradient_energy(edge)
    assert sharper.mean() == pytest.approx(float(edge.mean()), abs=1e-6)
    torch.testing.assert_close(sharper[..., :2], edge[..., :2])
