"""The discriminator of pixels: how far it sees, and that it hears what the painter was told."""

from __future__ import annotations

import torch
from torch import Tensor

from percov2.training.patch_discriminator import PatchDiscriminator
from percov2.training.picture_distances import BT601


def discriminator() -> PatchDiscriminator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Spectral normalisation goes on estimating in training.
        return PatchDiscriminator(4, 8).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_every_opinion_is_of_one_neighbourhood() -> None:
    judge, pictures, prediction = discriminator(), noise(1, 3, 128, 128), noise(1, 4, 16, 16)
    before = judge(pictures, prediction)
    assert before.shape == (1, 1, 16, 16)
    pictures[..., 64, 64] += 1
    changed = (judge(pictures, prediction) != before)[0, 0].nonzero()
    assert changed.amin(0).tolist() == [5, 5]
    assert changed.amax(0).tolist() == [11, 11]


def test_learns_what_only_the_prediction_tells() -> None:
    """Flat and noisy pictures, real where the prediction says so and painted where it does not."""
    judge = discriminator().train()
    flat, grain = torch.zeros(4, 3, 32, 32), noise(4, 3, 32, 32)
    plain, rough = torch.full((4, 4, 4, 4), -1.0), torch.full((4, 4, 4, 4), 1.0)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        real = judge(flat, plain).mean() + judge(grain, rough).mean()
        fake = judge(flat, rough).mean() + judge(grain, plain).mean()
        (fake - real).backward()
        optimizer.step()
    judge.eval()
    assert judge(flat, plain).mean() > judge(flat, rough).mean() + 0.1
    assert judge(grain, rough).mean() > judge(grain, plain).mean() + 0.1


def test_chroma_is_shown_stronger_than_luma() -> None:
    """How much more the opinion changes with Cb and Cr than with Y, for a step of the same size."""
    judge, prediction = discriminator(), noise(1, 4, 8, 8)
    picture = noise(1, 3, 64, 64).mul(0.1).requires_grad_()
    judge(picture, prediction).sum().backward()
    assert picture.grad is not None
    axes = torch.linalg.inv(torch.tensor(BT601)).T
    luma, *chroma = (
        (picture.grad * axis[:, None, None]).sum(1).square().mean().sqrt() for axis in axes
    )
    assert min(chroma) > 1.5 * luma
