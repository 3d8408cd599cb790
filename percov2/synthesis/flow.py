"""Rectified flow: the one place that knows the direction of time, the shift and the source.

Time t runs from 0 (data) to 1 (source), as in Stable Diffusion 3 (Esser et al. 2024):
``x_t = (1 - t) x_0 + t x_1``, velocity ``dx/dt = x_1 - x_0``. SD3's source is plain noise,
``x_1 = eps``; a flow that starts from a reconstruction has ``x_1 = prediction + sigma eps``.

What the network puts out goes with the source. From noise it is the velocity, as in SD3. From a
prediction it is the residual ``x_0 - prediction``: the velocity follows from it, a network that
puts out zero already paints the prediction, and none of its capacity goes into copying noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
"""SD3's transformer takes t * 1000 as its time input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flow:
    """A straight path between data and source, and the distribution of training times.

    Attributes:
        shift: resolution shift s >= 1 of the sampling grid and of training times, SD3 uses 3.0:
            t -> s t / (1 + (s - 1) t).
        from_prediction: start from the latent decoder's prediction plus noise, not from noise;
            the network then puts out the residual, not the velocity.
        sigma: standard deviation of the source's noise, > 0; must be 1 for a source of noise.
        temperature: of sampling, > 0: the source's noise is this many times that of training. Below
            1 a network that removes noise badly paints with less grain, and less detail.
        gain: of sampling, > 0: the residual painted is this many times the network's. Below 1 a
            network that invents detail paints nearer to the prediction, and more faithfully; must
            be 1 for a source of noise, whose network puts out no residual.
        logit_mean: mean of logit(t) in training, before the shift (0 in SD3).
        logit_std: standard deviation of logit(t) in training (1 in SD3).
    """

    shift: float
    from_prediction: bool
    sigma: float
    temperature: float = 1.0
    gain: float = 1.0
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.shift < 1:
            raise ValueError(f"shift is {self.shift}: it must be at least 1 (SD3 uses 3.0)")
        if self.sigma <= 0 or self.logit_std <= 0:
            raise ValueError(f"sigma {self.sigma} and logit_std {self.logit_std} must be positive")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature is {self.temperature}: it must be positive (1 is neutral)"
            )
        if self.gain <= 0:
            raise ValueError(f"gain is {self.gain}: it must be positive (1 is neutral)")
        if not self.from_prediction and self.gain != 1:
            raise ValueError(f"gain is {self.gain}: a flow that starts from noise needs gain 1")
        if not self.from_prediction and self.sigma != 1:
            raise ValueError(f"sigma is {self.sigma}: a flow that starts from noise needs sigma 1")

    def source(self, prediction: Tensor, noise: Tensor) -> Tensor:
        """x_1 from the predicted latents and standard normal noise, both (B, C, h, w)."""
        return prediction + self.sigma * noise if self.from_prediction else noise

    def sampling_source(self, prediction: Tensor, noise: Tensor) -> Tensor:
        """Where sampling starts: `source` with the noise at `temperature`."""
        return self.source(prediction, self.temperature * noise)

    def interpolate(self, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
        """x_t for times t (B,) in [0, 1]; x_0 and x_1 are (B, C, h, w)."""
        t = t.view(-1, *[1] * (x_0.ndim - 1))
        return (1 - t) * x_0 + t * x_1

    def target(self, x_0: Tensor, x_1: Tensor, prediction: Tensor) -> Tensor:
        """What the network should put out: velocity x_1 - x_0, or residual x_0 - prediction."""
        return x_0 - prediction if self.from_prediction else x_1 - x_0

    def output_to_velocity(
        self, output: Tensor, x_t: Tensor, prediction: Tensor, t: Tensor
    ) -> Tensor:
        """Velocity dx_t/dt of sampling from the network's output at times t (B,) in (0, 1]."""
        if not self.from_prediction:
            return output
        return (x_t - prediction - self.gain * output) / t.view(-1, *[1] * (x_t.ndim - 1))

    def output_to_data(self, output: Tensor, x_t: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The network's estimate of x_0 from its output at times t (B,) in (0, 1]."""
        if self.from_prediction:
            return prediction + output
        return x_t - t.view(-1, *[1] * (x_t.ndim - 1)) * output

    def shift_time(self, t: Tensor) -> Tensor:
        """Unshifted time in [0, 1] to shifted time; 0 and 1 stay."""
        # Written so that t = 1 stays exactly 1 in floating point, whatever the shift.
        return self.shift * t / ((1 - t) + self.shift * t)

    def normal_to_time(self, normal: Tensor) -> Tensor:
        """Standard normal numbers to training times in (0, 1): logit-normal, then shifted."""
        return self.shift_time(torch.sigmoid(self.logit_mean + self.logit_std * normal))

    def time_grid(self, steps: int) -> Tensor:
        """steps + 1 shifted times from 1 down to 0, float64.

        Raises:
            ValueError: steps < 1.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}: at least 1 sampling step is needed")
        return self.shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
