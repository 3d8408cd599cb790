"""The flow's path, times and source."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from percov2.synthesis.flow import NUM_TRAIN_TIMESTEPS, Flow
from percov2.synthesis.sampler import sample

SHAPE = (3, 2, 4, 6)


def noise_flow(**changes: float) -> Flow:
    return Flow(**{"shift": 3.0, "sigma": 1.0, **changes}, from_prediction=False)


def double(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_path_runs_from_data_at_0_to_source_at_1() -> None:
    x_0, x_1 = double(*SHAPE), double(*SHAPE, seed=1)
    flow, zeros = noise_flow(), torch.zeros(3, dtype=torch.float64)
    assert torch.equal(flow.interpolate(x_0, x_1, zeros), x_0)
    assert torch.equal(flow.interpolate(x_0, x_1, zeros + 1), x_1)


def test_each_sample_has_its_own_time() -> None:
    x_0, x_1 = double(*SHAPE), double(*SHAPE, seed=1)
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    x_t = noise_flow().interpolate(x_0, x_1, t)
    assert torch.equal(x_t[0], x_0[0])
    torch.testing.assert_close(x_t[1], 0.75 * x_0[1] + 0.25 * x_1[1])
    assert torch.equal(x_t[2], x_1[2])


def test_velocity_is_the_path_s_derivative() -> None:
    flow, x_0, x_1 = noise_flow(), double(*SHAPE), double(*SHAPE, seed=1)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    _, derivative = torch.func.jvp(
        lambda time: flow.interpolate(x_0, x_1, time), (t,), (torch.ones_like(t),)
    )
    target = flow.target(x_0, x_1, prediction=double(*SHAPE, seed=2))
    torch.testing.assert_close(target, derivative, rtol=0, atol=1e-14)
    assert flow.output_to_velocity(target, x_0, x_0, t) is target


def test_residual_output_gives_the_path_s_derivative_too() -> None:
    flow = Flow(shift=1.0, from_prediction=True, sigma=0.5)
    x_0, prediction, noise = (double(*SHAPE, seed=seed) for seed in range(3))
    x_1 = flow.source(prediction, noise)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x_t = flow.interpolate(x_0, x_1, t)
    output = flow.target(x_0, x_1, prediction)
    torch.testing.assert_close(output, x_0 - prediction)
    velocity = flow.output_to_velocity(output, x_t, prediction, t)
    torch.testing.assert_close(velocity, x_1 - x_0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("from_prediction", [False, True])
def test_the_true_output_gives_the_data(from_prediction: bool) -> None:
    sigma = 0.5 if from_prediction else 1.0
    flow = Flow(shift=1.0, from_prediction=from_prediction, sigma=sigma)
    x_0, prediction, noise = (double(*SHAPE, seed=seed) for seed in range(3))
    x_1 = flow.source(prediction, noise)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    x_t = flow.interpolate(x_0, x_1, t)
    output = flow.target(x_0, x_1, prediction)
    estimate = flow.output_to_data(output, x_t, prediction, t)
    torch.testing.assert_close(estimate, x_0, rtol=0, atol=1e-12)


def test_a_residual_of_zero_flows_to_the_prediction() -> None:
    flow = Flow(shift=1.0, from_prediction=True, sigma=0.5)
    prediction, noise = double(*SHAPE), double(*SHAPE, seed=1)

    def velocity(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        return flow.output_to_velocity(torch.zeros_like(x_t), x_t, prediction, t)

    found = sample(flow, velocity, prediction, flow.source(prediction, noise), steps=5)
    torch.testing.assert_close(found, prediction, rtol=0, atol=1e-12)


def test_source_is_noise_or_noisy_prediction() -> None:
    prediction, noise = double(*SHAPE), double(*SHAPE, seed=1)
    assert torch.equal(noise_flow().source(prediction, noise), noise)
    flow = Flow(shift=1.0, from_prediction=True, sigma=0.25)
    torch.testing.assert_close(flow.source(prediction, noise), prediction + noise / 4)


def test_temperature_scales_the_noise_of_sampling_alone() -> None:
    prediction, noise = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6)
    cold = Flow(shift=1.0, from_prediction=True, sigma=0.25, temperature=0.5)
    torch.testing.assert_close(cold.source(prediction, noise), prediction + noise / 4)
    torch.testing.assert_close(cold.sampling_source(prediction, noise), prediction + noise / 8)
    from_noise = Flow(shift=1.0, from_prediction=False, sigma=1.0, temperature=0.5)
    torch.testing.assert_close(from_noise.sampling_source(prediction, noise), noise / 2)


def test_gain_scales_the_residual_that_sampling_paints_alone() -> None:
    flow = Flow(shift=1.0, from_prediction=True, sigma=0.5, gain=1.25)
    x_0, prediction, noise = (double(*SHAPE, seed=seed) for seed in range(3))
    output = flow.target(x_0, flow.source(prediction, noise), prediction)

    def velocity(x_t: Tensor, condition: Tensor, t: Tensor) -> Tensor:
        return flow.output_to_velocity(output, x_t, prediction, t)

    painted = sample(flow, velocity, prediction, flow.source(prediction, noise), steps=3)
    expected = prediction + 1.25 * (x_0 - prediction)
    torch.testing.assert_close(painted, expected, rtol=0, atol=1e-12)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    estimate = flow.output_to_data(output, x_0, prediction, t)
    torch.testing.assert_close(estimate, x_0, rtol=0, atol=1e-12)


@given(
    shift=st.floats(1, 20),
    times=st.lists(st.floats(0, 1), min_size=2, max_size=8),
)
def test_shift_keeps_ends_and_order_and_moves_towards_noise(
    shift: float, times: list[float]
) -> None:
    t = torch.tensor(sorted(times), dtype=torch.float64)
    flow = noise_flow(shift=shift)
    shifted = flow.shift_time(t)
    assert flow.shift_time(torch.tensor([0.0, 1.0])).tolist() == [0, 1]
    assert (shifted.diff() >= -1e-15).all()
    assert (shifted >= t - 1e-15).all()


def test_shift_is_strictly_monotone() -> None:
    assert (noise_flow().shift_time(torch.linspace(0, 1, 1001).double()).diff() > 0).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_time_grid_equals_diffusers_scheduler(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    grid = noise_flow(shift=shift).time_grid(steps)
    torch.testing.assert_close(grid.float(), scheduler.sigmas, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        grid[:-1].float() * NUM_TRAIN_TIMESTEPS, scheduler.timesteps, rtol=0, atol=1e-3
    )


def test_time_grid_values() -> None:
    assert noise_flow(shift=1.0).time_grid(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    grid = noise_flow(shift=3.0).time_grid(2)
    assert grid.dtype == torch.float64
    assert grid.tolist() == [1, 0.75, 0]


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_training_times_are_logit_normal_and_shifted(shift: float) -> None:
    flow = noise_flow(shift=shift, logit_mean=0.4, logit_std=0.7)
    t = flow.normal_to_time(double(40_000))
    assert ((t > 0) & (t < 1)).all()
    # The shift adds log(s) to the logit, so the logits stay normal.
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(0.4 + math.log(shift), abs=0.02)
    assert logits.std().item() == pytest.approx(0.7, abs=0.02)


def test_median_training_time_of_sd3() -> None:
    assert noise_flow().normal_to_time(torch.zeros(1)).item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shift": 0.9}, "shift is 0.9"),
        ({"sigma": 0.0, "from_prediction": True}, "sigma 0.0"),
        ({"sigma": -1.0}, "sigma -1.0"),
        ({"logit_std": 0.0}, "logit_std 0.0"),
        ({"sigma": 0.5}, "needs sigma 1"),
        ({"gain": 0.0, "from_prediction": True}, "gain is 0.0"),
        ({"gain": 1.1}, "needs gain 1"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Flow(**{"shift": 3.0, "from_prediction": False, "sigma": 1.0, **fields})


@pytest.mark.parametrize("steps", [0, -3])
def test_time_grid_needs_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        noise_flow().time_grid(steps)
