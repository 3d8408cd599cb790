"""The Fréchet distance over many steps, and the gradient of one step's windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from percov2.evaluation.features import frechet_distance
from percov2.training.frechet_loss import REFRESH, WARM_UP, FrechetLoss

FEATURES = 6
STEPS = 3000
MIX = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(9))
OTHER_MIX = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(10))


def draws(step: int, mix: Tensor, *, mean: float = 0.0, windows: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(windows, FEATURES, generator=generator) @ mix + mean


def accustomed(painted: Tensor, original: Tensor, *, mean: float) -> FrechetLoss:
    loss = FrechetLoss(FEATURES)
    for step in range(STEPS):
        loss(draws(step, painted, mean=mean), draws(STEPS + step, original))
    return loss


def test_same_windows_are_not_apart_and_the_first_step_compares_means() -> None:
    assert float(FrechetLoss(FEATURES)(draws(0, MIX), draws(0, MIX))) < 1e-12
    eye = torch.eye(FEATURES)
    first = FrechetLoss(FEATURES)(
        draws(0, eye, mean=2.0, windows=4096), draws(1, eye, windows=4096)
    )
    assert float(first) == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("mean", [0.0, 1.0])
@pytest.mark.parametrize("painted", [MIX, 2 * MIX, OTHER_MIX])
def test_few_windows_a_step_add_up_to_the_distance(painted: Tensor, mean: float) -> None:
    """Against torchmetrics' distance of the same distributions, many windows of each."""
    loss = accustomed(painted, MIX, mean=mean)
    many = draws(-1, painted, mean=mean, windows=200_000), draws(-2, MIX, windows=200_000)
    expected = frechet_distance(*([np.asarray(x)] for x in many))
    variance = float(many[1].var(0).sum())
    found = float(loss(*many))
    assert found == pytest.approx(expected / variance, rel=0.1, abs=0.01)


def test_steps_that_follow_the_gradient_take_one_gaussian_to_the_other() -> None:
    """Scale, correlations and mean: an affine painter learns the original's covariance."""
    weight = OTHER_MIX.clone().requires_grad_()
    bias = torch.ones(FEATURES, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=0.05)
    loss = FrechetLoss(FEATURES)
    for step in range(STEPS):
        painted = draws(step, torch.eye(FEATURES)) @ weight + bias
        optimizer.zero_grad()
        loss(painted, draws(STEPS + step, MIX)).backward()
        optimizer.step()
    found, wanted, before = (w.detach().T @ w.detach() for w in (weight, MIX, OTHER_MIX))
    assert torch.dist(found, wanted) < 0.15 * torch.dist(before, wanted)
    assert bias.detach().abs().max() < 0.2


def test_transport_waits_for_windows_and_is_refreshed_now_and_then() -> None:
    loss, eye = FrechetLoss(FEATURES), torch.eye(FEATURES)
    changes = []
    for step in range(1, WARM_UP + 2 * REFRESH + 1):
        before = loss.transport.clone()
        loss(draws(step, MIX), draws(-step, OTHER_MIX))
        if not torch.equal(loss.transport, before):
            changes.append(step)
        if step < WARM_UP:
            assert torch.equal(loss.transport, eye)
    assert changes == [WARM_UP, WARM_UP + REFRESH, WARM_UP + 2 * REFRESH]


def test_half_precision_outside_leaves_the_distance_in_single() -> None:
    plain, cast = FrechetLoss(FEATURES), FrechetLoss(FEATURES)
    both = draws(0, MIX, mean=1.0), draws(1, OTHER_MIX)
    expected = plain(*both)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(*both), expected)
    assert torch.equal(cast.squares, plain.squares)


def test_state_goes_on_where_it_was_saved() -> None:
    first, second = FrechetLoss(FEATURES), FrechetLoss(FEATURES)
    for step in range(WARM_UP + 3):
        first(draws(step, MIX, mean=1.0), draws(-step - 1, OTHER_MIX))
    second.load_state_dict(first.state_dict())
    again, before = (m(draws(5, MIX), draws(6, OTHER_MIX)) for m in (second, first))
    assert torch.equal(again, before)
