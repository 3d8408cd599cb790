"""Optimiser and learning-rate schedule that the stages share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerName = Literal["adamw", "adamw_fused", "adamw_8bit", "deepspeed_cpu_adam"]

STATE_BYTES: dict[OptimizerName, int] = {
    "adamw": 8,
    "adamw_fused": 8,
    "adamw_8bit": 2,
    "deepspeed_cpu_adam": 8,
}
"""Bytes of the two moments per trained value."""

_NEEDS: dict[OptimizerName, tuple[str, str]] = {
    "adamw_8bit": ("bitsandbytes", "8bit"),
    "deepspeed_cpu_adam": ("deepspeed", "deepspeed"),
}
"""Package and extra of the optimisers that are not torch's."""


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW with linear warm-up, then a constant or a cosine to zero.

    Attributes:
        lr: peak learning rate (1e-5 for finetuning SD3).
        warmup_steps: linear from 0.
        weight_decay: of AdamW (0.01 in the paper).
        decay: what follows the warm-up.
        optimizer: which AdamW. ``adamw_fused`` is one kernel, ``adamw_8bit`` keeps its moments in
            8 bits (bitsandbytes, GPU only), ``deepspeed_cpu_adam`` is for an optimiser that
            DeepSpeed keeps in the computer's memory.
        betas: decay of AdamW's two moments.
        eps: added to the root of the second moment.

    Raises:
        ValueError: a value out of range, or an optimiser whose package is not installed.
    """

    lr: float
    warmup_steps: int
    weight_decay: float = 0.01
    decay: Literal["constant", "cosine"] = "constant"
    optimizer: OptimizerName = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.warmup_steps < 0 or self.weight_decay < 0 or self.eps <= 0:
            raise ValueError(
                f"lr {self.lr} and eps {self.eps} must be positive, warmup_steps "
                f"{self.warmup_steps} and weight_decay {self.weight_decay} not negative"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}: both must lie in [0, 1)")
        package, extra = _NEEDS.get(self.optimizer, (None, None))
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f"optimizer {self.optimizer!r} needs {package}, which is not installed: run "
                f"`pip install '.[{extra}]'` or choose 'adamw'"
            )

    def factor(self, step: int, *, first: int, last: int) -> float:
        """Share of the peak rate at an optimiser step of a phase that runs first .. last - 1."""
        if not first <= step < last:
            return 0.0
        warm = (step - first + 1) / max(1, self.warmup_steps)
        if warm < 1:
            return warm
        if self.decay == "constant":
            return 1.0
        progress = (step - first - self.warmup_steps) / max(1, last - first - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Parameters that are trained from step ``first`` to ``last`` - 1.

    Attributes:
        optimization: rate and schedule of the phase.
        parameters: those that require no gradient are left out.
        first: first optimiser step.
        last: step after the last one.
    """

    optimization: Optimization
    parameters: Iterable[nn.Parameter]
    first: int
    last: int

    def factor(self, step: int) -> float:
        """Share of the peak learning rate at an optimiser step."""
        return self.optimization.factor(step, first=self.first, last=self.last)


def build_optimizer(*phases: Phase, strategy: Strategy | None = None) -> dict[str, Any]:
    """AdamW and learning-rate schedule of the phases, as Lightning wants them.

    Args:
        phases: a parameter group each; all of one optimiser.
        strategy: the trainer's; None stands for one without offload.

    Raises:
        ValueError: phases of different optimisers, a phase with nothing to train, or an optimiser
            that does not suit the device or the strategy.
    """
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in phase.parameters if p.requires_grad],
            "lr": phase.optimization.lr,
            "betas": tuple(phase.optimization.betas),
            "eps": phase.optimization.eps,
            "weight_decay": phase.optimization.weight_decay,
        }
        for phase in phases
    ]
    for phase, group in zip(phases, groups, strict=True):
        if not group["params"]:
            raise ValueError(
                f"nothing to train from step {phase.first} on: every parameter is frozen"
            )
    names = {phase.optimization.optimizer for phase in phases}
    if len(names) != 1:
        raise ValueError(f"phases name the optimisers {sorted(names)}: choose one for all")
    name = names.pop()
    _check_eight_bits(name, {p.device.type for group in groups for p in group["params"]}, strategy)
    _check_offload(name, strategy)
    optimizer = _make(name, groups)
    scheduler = _Schedule(optimizer, [phase.factor for phase in phases])
    optimizer.register_load_state_dict_pre_hook(_keep_options)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class _Schedule(LambdaLR):
    """Of the rates and the length that are configured, not of those of the checkpoint it resumes
    from: of a run that is extended the rate was 0 at its end."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step; the optimiser has been restored before."""
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        factors = [factor(self.last_epoch) for factor in self.lr_lambdas]
        self._last_lr = [rate * f for rate, f in zip(self.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def _keep_options(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's moments with the configured options, which torch would replace."""
    if len(state_dict["param_groups"]) != len(optimizer.param_groups):
        return state_dict  # torch refuses it
    groups = []
    for saved, now in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        kept = {name: now[name] for name in ("lr", "initial_lr", "betas", "eps", "weight_decay")}
        groups.append({**saved, **kept})
    return {**state_dict, "param_groups": groups}


def offloads_optimizer(strategy: Strategy | None) -> bool:
    """Whether DeepSpeed keeps the optimiser's state in the computer's memory."""
    return bool(_zero_config(strategy).get("offload_optimizer"))


def _zero_config(strategy: Strategy | None) -> dict[str, Any]:
    if not isinstance(strategy, DeepSpeedStrategy) or strategy.config is None:
        return {}
    zero: dict[str, Any] = strategy.config.get("zero_optimization", {})
    return zero


def _check_eight_bits(name: OptimizerName, devices: set[str], strategy: Strategy | None) -> None:
    if name != "adamw_8bit":
        return
    if isinstance(strategy, DeepSpeedStrategy):
        # DeepSpeed cuts and pads moments as it does weights; whether these bear it is not known.
        raise ValueError(
            "optimizer 'adamw_8bit' does not go with DeepSpeed, which divides the moments among "
            "the processes: choose 'adamw', or configs/strategy/ddp.yaml"
        )
    if devices != {"cuda"}:
        raise ValueError(
            f"optimizer 'adamw_8bit' runs on a CUDA GPU only, the weights are on "
            f"{', '.join(sorted(devices))}: choose 'adamw'"
        )


def _check_offload(name: OptimizerName, strategy: Strategy | None) -> None:
    """DeepSpeed's own refusal comes late and speaks of its configuration file."""
    offloads = offloads_optimizer(strategy)
    if name == "deepspeed_cpu_adam" and not offloads:
        raise ValueError(
            "optimizer 'deepspeed_cpu_adam' needs a strategy with offload_optimizer (add --config "
            "configs/strategy/zero3_offload.yaml), or choose 'adamw'"
        )
    if not offloads or name == "deepspeed_cpu_adam":
        return
    assert isinstance(strategy, DeepSpeedStrategy)
    assert strategy.config is not None
    if strategy.config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"optimizer {name!r} would run slowly on a strategy with offload_optimizer: choose "
            "'deepspeed_cpu_adam'"
        )


def _make(name: OptimizerName, groups: list[dict[str, Any]]) -> Any:
    if name == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(groups)
    if name == "deepspeed_cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True)
    optimizer = AdamW(groups, fused=True if name == "adamw_fused" else None)
    # The fused one offers to divide by a gradient scaler's factor, for which Lightning refuses to
    # clip its gradients, whether there is a scaler (float16) or none (bfloat16).
    optimizer._step_supports_amp_scaling = False
    return optimizer
