"""Means and variances of features over many steps, and the gradient of one step's windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from percov2.training.feature_moments import DECAY, FeatureMoments


def draws(step: int, *, mean: float = 0.0, deviation: float = 1.0, windows: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(windows, 6, generator=generator) * deviation + mean


def test_same_features_are_not_apart_and_no_step_is_needed_to_warm_up() -> None:
    assert float(FeatureMoments(6)(draws(0), draws(0))) == 0
    first = FeatureMoments(6)(draws(0, mean=2.0, windows=4096), draws(1, windows=4096))
    assert float(first) == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize(
    ("mean", "deviation", "apart"), [(0.5, 1.0, 0.25), (0.0, 1.5, 0.25), (-1.0, 0.5, 1.25)]
)
def test_few_windows_a_step_add_up_to_the_distance_of_gaussians(
    mean: float, deviation: float, apart: float
) -> None:
    """Squared difference of means, and of standard deviations, per feature of variance 1."""
    moments, found = FeatureMoments(6), []
    for step in range(300):
        found.append(
            float(moments(draws(step, mean=mean, deviation=deviation), draws(1000 + step)))
        )
    assert sum(found[200:]) / 100 == pytest.approx(apart, rel=0.1, abs=0.02)


def test_steps_gradient_is_that_of_its_share_in_an_average_over_all() -> None:
    """With exact running moments it is the gradient of the windows' own moments there."""
    moments = FeatureMoments(1)
    for step in range(400):
        moments(draws(step, mean=1.0)[:, :1], draws(500 + step)[:, :1])
    painted = torch.tensor([[0.0], [3.0]], requires_grad=True)
    moments(painted, draws(1000)[:, :1]).backward()
    running = moments.moments / (1 - DECAY**401)
    mean, square = running[:, 0, 0], running[:, 1, 0]
    deviation = (square - mean.square()).sqrt()
    # d/dx of (m - m')^2 + (s - s')^2, with dm = dx / 2 and ds = (x - m) dx / 2 s.
    slope = (mean[0] - mean[1]) + (deviation[0] - deviation[1]) * (
        painted.detach()[:, 0] - mean[0]
    ) / deviation[0]
    assert painted.grad is not None
    assert torch.allclose(painted.grad[:, 0], slope / deviation[1].square(), rtol=1e-3)


def test_state_goes_on_where_it_was_saved() -> None:
    first, second = FeatureMoments(6), FeatureMoments(6)
    for step in range(3):
        first(draws(step, mean=1.0), draws(10 + step))
    second.load_state_dict(first.state_dict())
    again, before = (m(draws(5), draws(6)) for m in (second, first))
    assert torch.equal(again, before)
