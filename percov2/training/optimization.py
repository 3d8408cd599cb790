"""Optimiser and learning-rate schedule that the stages share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW with linear warm-up, then a constant or a cosine to zero.

    Attributes:
        lr: peak learning rate (1e-5 for finetuning SD3).
        warmup_steps: linear from 0.
        weight_decay: of AdamW (0.01 in the paper).
        decay: what follows the warm-up.
    """

    lr: float
    warmup_steps: int
    weight_decay: float = 0.01
    decay: Literal["constant", "cosine"] = "constant"

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


def build_optimizer(*phases: Phase) -> dict[str, Any]:
    """AdamW and learning-rate schedule of the phases, as Lightning wants them."""
    groups = [
        {
            "params": [p for p in phase.parameters if p.requires_grad],
            "lr": phase.optimization.lr,
            "weight_decay": phase.optimization.weight_decay,
        }
        for phase in phases
    ]
    optimizer = AdamW(groups, betas=(0.9, 0.99))
    scheduler = LambdaLR(optimizer, [phase.factor for phase in phases])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
