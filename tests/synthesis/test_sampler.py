"""Euler steps, guidance and tiles."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from percov2.synthesis.flow import Flow
from percov2.synthesis.sampler import Tiling, Velocity, guided, sample, tiled

SD3 = Flow(shift=3.0, from_prediction=False, sigma=1.0)
STRAIGHT = Flow(shift=1.0, from_prediction=False, sigma=1.0)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pointwise(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
    """A velocity whose value at a place depends on that place alone."""
    return torch.sin(x_t) + condition.sum(1, keepdim=True) * t.view(-1, 1, 1, 1)


class Recorder:
    """A velocity that notes the shapes and times it is called with."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.shapes: list[tuple[int, ...]] = []
        self.times: list[Tensor] = []

    def __call__(self, x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        assert condition.shape[0] == x_t.shape[0] == len(t)
        assert condition.shape[2:] == x_t.shape[2:]
        self.shapes.append(tuple(x_t.shape))
        self.times.append(t)
        return self.velocity(x_t, condition, t)


# -- Euler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flow", [SD3, STRAIGHT])
@pytest.mark.parametrize("steps", [1, 7])
def test_constant_velocity_is_followed_exactly(flow: Flow, steps: int) -> None:
    data, source = normal(2, 3, 4, 4, dtype=torch.float64), normal(2, 3, 4, 4, seed=1).double()
    straight = flow.target(data, source, prediction=data)
    found = sample(flow, lambda x_t, c, t: straight, data, source, steps=steps)
    torch.testing.assert_close(found, data, rtol=0, atol=1e-14)


@pytest.mark.parametrize("flow", [SD3, STRAIGHT])
def test_error_falls_in_proportion_to_the_step(flow: Flow) -> None:
    source = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    exact = math.exp(-2)  # dx/dt = 2 x, from x(1) = 1 to x(0)

    def error(steps: int) -> float:
        found = sample(flow, lambda x_t, c, t: 2 * x_t, source, source, steps=steps)
        return abs(found[0, 0, 0, 0].item() - exact)

    assert math.log2(error(64) / error(128)) == pytest.approx(1, abs=0.05)
    assert math.log2(error(128) / error(256)) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("flow", [SD3, STRAIGHT])
@pytest.mark.parametrize("steps", [1, 5, 20])
def test_equals_diffusers_scheduler(flow: Flow, steps: int) -> None:
    source, condition = normal(2, 3, 4, 6), normal(2, 2, 4, 6, seed=1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=flow.shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    expected = source
    for time in scheduler.timesteps:
        v = pointwise(expected, condition, (time / 1000).repeat(2))
        expected = scheduler.step(v, time, expected).prev_sample
    found = sample(flow, pointwise, condition, source, steps=steps)
    assert (found - source).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_network_is_called_once_a_step_at_the_grid_s_times() -> None:
    velocity = Recorder(pointwise)
    sample(SD3, velocity, normal(3, 2, 4, 4), normal(3, 3, 4, 4), steps=4)
    times = torch.stack(velocity.times)
    assert times.shape == (4, 3)
    torch.testing.assert_close(times[:, 1].double(), SD3.time_grid(4)[:-1], rtol=0, atol=1e-7)


def test_sampling_keeps_no_graph() -> None:
    source = normal(1, 1, 2, 2).requires_grad_()
    assert not sample(SD3, pointwise, source, source, steps=2).requires_grad


def test_no_step_is_refused() -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        sample(SD3, pointwise, normal(1, 1, 2, 2), normal(1, 1, 2, 2), steps=0)


# -- guidance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guidance_extrapolates_from_the_unconditional_velocity(guidance: float) -> None:
    x_t, condition, t = normal(1, 2, 4, 4), normal(1, 3, 4, 4, seed=1), torch.tensor([0.5])
    velocity = guided(pointwise, lambda x, c, t: x.cos(), guidance)
    expected = (1 - guidance) * x_t.cos() + guidance * pointwise(x_t, condition, t)
    torch.testing.assert_close(velocity(x_t, condition, t), expected)


@pytest.mark.parametrize(("guidance", "evaluations"), [(1, (1, 0)), (0, (0, 1)), (2, (1, 1))])
def test_guidance_of_1_and_0_evaluates_one_velocity_only(
    guidance: float, evaluations: tuple[int, int]
) -> None:
    conditional, unconditional = Recorder(pointwise), Recorder(pointwise)
    grid = normal(1, 2, 4, 4)
    guided(conditional, unconditional, guidance)(grid, grid, torch.tensor([0.5]))
    assert (len(conditional.shapes), len(unconditional.shapes)) == evaluations


# -- tiles ---------------------------------------------------------------------------------------


@st.composite
def tilings(draw: st.DrawFn) -> Tiling:
    size = 2 * draw(st.integers(1, 40))
    return Tiling(size=size, overlap=2 * draw(st.integers(0, size // 2 - 1)))


@given(tiling=tilings(), half_length=st.integers(1, 600))
def test_tiles_cover_any_axis_evenly(tiling: Tiling, half_length: int) -> None:
    length = 2 * half_length
    starts = tiling.starts(length)
    assert starts[0] == 0
    if length <= tiling.size:
        assert starts == [0]
        return
    assert starts[-1] + tiling.size == length
    assert all(start % 2 == 0 for start in starts)
    strides = [later - now for now, later in pairwise(starts)]
    assert min(strides) > 0
    assert max(strides) <= tiling.size - tiling.overlap, "neighbours overlap too little"
    assert max(strides) - min(strides) <= 2 or tiling.size - tiling.overlap == 2
    assert len(starts) == math.ceil((length - tiling.overlap) / (tiling.size - tiling.overlap))


@pytest.mark.parametrize(
    ("size", "overlap", "batch"),
    [(15, 4, 1), (16, 3, 1), (16, 16, 1), (16, -2, 1), (16, 4, 0), (0, 0, 1)],
)
def test_bad_tilings_are_refused(size: int, overlap: int, batch: int) -> None:
    with pytest.raises(ValueError, match=f"tile size {size} and overlap {overlap}.*batch {batch}"):
        Tiling(size=size, overlap=overlap, batch=batch)


@pytest.mark.parametrize("grid", [(16, 16), (18, 40), (8, 50), (50, 8), (34, 66)])
@pytest.mark.parametrize("overlap", [0, 4, 14])
def test_tiles_change_nothing_where_the_velocity_is_pointwise(
    grid: tuple[int, int], overlap: int
) -> None:
    x_t, condition = normal(2, 3, *grid), normal(2, 2, *grid, seed=1)
    t = torch.tensor([0.2, 0.9])
    velocity = tiled(pointwise, Tiling(size=16, overlap=overlap, batch=3))
    torch.testing.assert_close(
        velocity(x_t, condition, t), pointwise(x_t, condition, t), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("grid", [(16, 16), (8, 16), (2, 2)])
def test_a_grid_that_fits_is_evaluated_whole(grid: tuple[int, int]) -> None:
    velocity, x_t = Recorder(pointwise), normal(2, 3, *grid)
    tiled(velocity, Tiling(size=16, overlap=4))(x_t, x_t, torch.tensor([0.2, 0.9]))
    assert velocity.shapes == [(2, 3, *grid)]


@pytest.mark.parametrize("batch", [1, 4, 5, 100])
def test_memory_is_bounded_by_the_batch_of_tiles(batch: int) -> None:
    velocity = Recorder(pointwise)
    tiling = Tiling(size=8, overlap=2, batch=batch)
    x_t = normal(1, 3, 26, 20)
    tiled(velocity, tiling)(x_t, x_t, torch.tensor([0.5]))
    tiles = 4 * 3
    assert len(velocity.shapes) == math.ceil(tiles / batch)
    assert sum(shape[0] for shape in velocity.shapes) == tiles
    assert max(shape[0] for shape in velocity.shapes) <= batch
    assert {shape[1:] for shape in velocity.shapes} == {(3, 8, 8)}


@pytest.mark.parametrize("grid", [(40, 56), (34, 16), (8, 62), (18, 18), (28, 20)])
@pytest.mark.parametrize("overlap", [2, 4, 8])
def test_no_seam_shows_where_tiles_disagree(grid: tuple[int, int], overlap: int) -> None:
    """Each tile claims a constant of its own; the blend must pass from one to the next gently."""
    draws = torch.Generator().manual_seed(0)

    def opinion(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        return torch.rand(len(x_t), 1, 1, 1, generator=draws).expand_as(x_t)

    x_t = normal(1, 1, *grid)
    blend = tiled(opinion, Tiling(size=16, overlap=overlap, batch=3))(x_t, x_t, torch.zeros(1))
    assert blend.min() >= 0
    assert blend.max() <= 1
    assert blend.max() - blend.min() > 0.1
    steepest = max(blend.diff(dim=axis).abs().max().item() for axis in (2, 3))
    assert steepest <= 1 / (overlap + 1) + 1e-6


def test_overlap_blends_half_and_half_in_its_middle() -> None:
    values = iter([0.0, 1.0])

    def opinion(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x_t, next(values))

    x_t = normal(1, 1, 2, 12)
    blend = tiled(opinion, Tiling(size=8, overlap=4, batch=1))(x_t, x_t, torch.zeros(1))
    expected = torch.tensor([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    torch.testing.assert_close(blend[0, 0, 0], expected)


def test_tiled_sampling_equals_untiled_where_the_velocity_is_pointwise() -> None:
    source, condition = normal(1, 2, 24, 18), normal(1, 2, 24, 18, seed=1)
    velocity = tiled(pointwise, Tiling(size=10, overlap=4))
    torch.testing.assert_close(
        sample(SD3, velocity, condition, source, steps=3),
        sample(SD3, pointwise, condition, source, steps=3),
        rtol=0,
        atol=5e-6,
    )
